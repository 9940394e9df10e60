"""The error tree. Every error says what happened, what was expected, and (``hint``) what to do next.

    WmguardError                        exit code
    ├── UsageError                      2   something the caller can put right in the call
    │   ├── ConfigError                 2   a setting, or a reference to a key, that cannot be right
    │   ├── CapacityError               2   the model is too small for the payload at this budget
    │   ├── QualityError                2   the mark costs more than the config allows
    │   └── UnsupportedError            2   a model or a training mode in which the promises cannot be kept
    ├── IntegrityError                  3   something is not what it claims to be
    │   ├── KeyFormatError              3   a key file of the wrong length or kind
    │   ├── KeyPermissionError          3   a key file that others can read
    │   ├── AuthenticationError         3   a wrong key or identity, or ciphertext that was changed
    │   ├── FormatError                 3   a file that is not well formed
    │   ├── ManifestError               3   a manifest that does not match its signature or its files
    │   ├── RegistryError               3   a registry that was cut, edited or belongs to another owner
    │   ├── TranscriptError             3   a transcript of a probe that was cut, edited or signed by another
    │   ├── OwnershipError              3   a folder that holds somebody else's protected model
    │   ├── ExposureError               3   something that would be, or is, open to more than it is meant for
    │   └── NonFiniteWeightError        3   NaN or Inf in a weight
    └── EnvironmentFault                4   something outside is missing
        ├── NotFoundError               4   a file or folder
        ├── EndpointError               4   an API that cannot be asked, or not any more
        ├── KeyServiceError             4   a key service or token that does not answer, or is too busy
        ├── StoreError                  4   a store (the Hub, S3) that refuses, does not answer, or has changed
        ├── UnsavedRunError             4   a marked model that was never saved
        └── MissingDependencyError      4   a package

"Not detected" is a result, never an error.
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "CapacityError",
    "ConfigError",
    "EndpointError",
    "EnvironmentFault",
    "ExposureError",
    "FormatError",
    "IntegrityError",
    "KeyFormatError",
    "KeyPermissionError",
    "KeyServiceError",
    "ManifestError",
    "MissingDependencyError",
    "NonFiniteWeightError",
    "NotFoundError",
    "OwnershipError",
    "QualityError",
    "RegistryError",
    "StoreError",
    "TranscriptError",
    "UnsavedRunError",
    "UnsupportedError",
    "UsageError",
    "WmguardError",
]


class WmguardError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        message: What happened: got and expected. Never key bytes, never plaintext.
        hint: What to do next; the command line prints it on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(WmguardError):
    """Something the caller can put right in the call."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting, or a reference to a key, that cannot be right."""


class CapacityError(UsageError):
    """The model is too small for the payload at this budget."""


class QualityError(UsageError):
    """A marked model that is worse than the config allows."""


class UnsupportedError(UsageError):
    """A model or a training mode in which the promises cannot be kept."""


class IntegrityError(WmguardError):
    """Something is not what it claims to be."""

    exit_code = 3


class KeyFormatError(IntegrityError):
    """A key file of the wrong length or kind."""


class KeyPermissionError(IntegrityError):
    """A key file that others can read."""


class AuthenticationError(IntegrityError):
    """A wrong key or identity, or ciphertext that was changed."""


class FormatError(IntegrityError):
    """A file that is not well formed."""


class ManifestError(IntegrityError):
    """A manifest that does not match its signature or its files."""


class RegistryError(IntegrityError):
    """A registry that was cut, edited or belongs to another owner."""


class TranscriptError(IntegrityError):
    """A transcript of a probe that was cut, edited, reordered or signed by another."""


class OwnershipError(IntegrityError):
    """A folder that holds somebody else's protected model."""


class ExposureError(IntegrityError):
    """Something that would be, or is, open to more people than it is meant for, such as a public repository."""


class NonFiniteWeightError(IntegrityError):
    """NaN or Inf in a weight."""


class EnvironmentFault(WmguardError):
    """Something outside is missing."""

    exit_code = 4


class NotFoundError(EnvironmentFault):
    """A file or a folder is missing."""


class EndpointError(EnvironmentFault):
    """An API that cannot be asked, or not any more."""


class KeyServiceError(EnvironmentFault):
    """A key service, keyring or token that does not answer, or is too busy. Trying again later may help."""


class StoreError(EnvironmentFault):
    """A store, the Hub or S3, that refuses, does not answer, or has changed meanwhile."""


class UnsavedRunError(EnvironmentFault):
    """A marked model that was never saved: named on stderr when the process ends, whose exit code is its own."""


class MissingDependencyError(EnvironmentFault):
    """An optional package is missing."""
