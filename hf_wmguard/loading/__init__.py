"""A protected folder becomes a model in memory, without plaintext on disk.

Importing this package also lets ``from_pretrained`` of transformers and peft open protected folders, with the identity
in ``WMGUARD_IDENTITY`` and, where it is set, only those signed with the key in ``WMGUARD_SIGNER``.
"""

from hf_wmguard.decryption import decrypt_folder
from hf_wmguard.loading.native import install
from hf_wmguard.loading.protected import load_protected, load_suspect, read_state_dict

__all__ = ["decrypt_folder", "load_protected", "load_suspect", "read_state_dict"]

install()
