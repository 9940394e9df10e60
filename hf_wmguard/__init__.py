"""hf-wmguard: a fine-tuned model that says whose it is, and is never on disk in plaintext.

The tour:

* `WatermarkConfig` says what to embed and for whom to encrypt.
* `protect_trainer(trainer, config)` is the one line a Trainer script gets. In the last epochs the weights come to
  carry the owner's signature and the behaviour a trigger set; every save is ciphertext with a signed manifest.
* `Guard(config, model, optimizer, accelerator, ...)` does the same in a training loop of your own.
* `embed(model, config)` marks a finished model in memory without training, `embed_folder(...)` one on the disk.
* `protect_folder(...)` encrypts a finished model from folder to folder, without loading it.
* `verify(suspect, ...)` judges a suspect by its weights, `probe(model, ...)` by its answers; both give an exact or
  proven p-value in a `Report`.
* `load_protected(folder, ...)` brings a protected folder into memory, also one on the Hub or in S3.
* ``hf_wmguard.delivery.pushing.push`` and ``pulling.pull`` take protected folders to the Hub or S3, and back.
* `WmguardError` is the root of every error.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_wmguard.config import ProtectionConfig, QualityConfig, SignatureConfig, TriggerConfig, WatermarkConfig
    from hf_wmguard.embedding import Embedded, embed, embed_folder
    from hf_wmguard.errors import WmguardError
    from hf_wmguard.loading import load_protected
    from hf_wmguard.protection import Protected, protect_folder
    from hf_wmguard.reports import Report
    from hf_wmguard.training import Guard, WatermarkCallback, protect_trainer
    from hf_wmguard.verification import probe, verify

__version__ = "0.1.0"

_EXPORTS = {
    "Embedded": "hf_wmguard.embedding",
    "Guard": "hf_wmguard.training",
    "Protected": "hf_wmguard.protection",
    "ProtectionConfig": "hf_wmguard.config",
    "QualityConfig": "hf_wmguard.config",
    "Report": "hf_wmguard.reports",
    "SignatureConfig": "hf_wmguard.config",
    "TriggerConfig": "hf_wmguard.config",
    "WatermarkCallback": "hf_wmguard.training",
    "WatermarkConfig": "hf_wmguard.config",
    "WmguardError": "hf_wmguard.errors",
    "embed": "hf_wmguard.embedding",
    "embed_folder": "hf_wmguard.embedding",
    "load_protected": "hf_wmguard.loading",
    "probe": "hf_wmguard.verification",
    "protect_folder": "hf_wmguard.protection",
    "protect_trainer": "hf_wmguard.training",
    "verify": "hf_wmguard.verification",
}
__all__ = [
    "Embedded",
    "Guard",
    "Protected",
    "ProtectionConfig",
    "QualityConfig",
    "Report",
    "SignatureConfig",
    "TriggerConfig",
    "WatermarkCallback",
    "WatermarkConfig",
    "WmguardError",
    "__version__",
    "embed",
    "embed_folder",
    "load_protected",
    "probe",
    "protect_folder",
    "protect_trainer",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lazy, because torch and transformers take seconds to import and `wmguard --help` should not.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_wmguard' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
