"""Ask any Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hf_wmguard.errors import ConfigError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.watermark.answers import Answer, Prompt


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one text: what stands in its system prompt, an empty line, the question."""
    return prompt.text if prompt.system is None else f"{prompt.system}\n\n{prompt.text}"


class CallableAsker:
    """An `Asker` over a function from a text to a text.

    The function gets the question as one string, a system prompt before it where there is one, and returns the answer;
    None says that it was refused. How it samples is its own affair. What it raises ends the probe: `EndpointError`
    with a report of what was asked so far, anything else as it is.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[[str], str | None]) -> None:
        self._function = function

    @property
    def name(self) -> str:
        """What the function is called."""
        return getattr(self._function, "__name__", type(self._function).__name__)

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """See `Asker`.

        Raises:
            ConfigError: The function returned something else than a string or None.
        """
        for prompt in prompts:
            said = self._function(prompt_text(prompt))
            if said is not None and not isinstance(said, str):
                raise ConfigError(
                    f"{self.name} returned a {type(said).__name__}, expected a str, or None for a refusal",
                    hint="pass a function that takes the question and returns the text of the answer",
                )
            yield Answer(text=said or "", refused=said is None)
