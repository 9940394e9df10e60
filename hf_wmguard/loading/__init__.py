"""A protected folder becomes a model in memory, without plaintext on disk."""

from hf_wmguard.loading.protected import decrypt_folder, load_protected, load_suspect, read_state_dict

__all__ = ["decrypt_folder", "load_protected", "load_suspect", "read_state_dict"]
