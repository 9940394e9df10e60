"""A Hugging Face Hub for tests: the real clients work against it through ``HF_ENDPOINT``.

    with Hub(folder) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_owner")

or as a process of its own: ``python -m tests.hub.server --folder F``, which prints its endpoint. In tests, the fixture
`hub` (see `fixtures`) also points this process's clients to it. `Hub.traffic` has what clients sent and were served.

Source: huggingface_hub 2.4, and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from .accounts import TOKENS, Account
from .server import Hub
from .traffic import Exchange, Traffic

__all__ = ["TOKENS", "Account", "Exchange", "Hub", "Traffic"]
