"""What is said of a save when it is written."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from hf_wmguard.evidence.manifest import Manifest
from hf_wmguard.watermark.pvalues import log10_binomial_tail

_logger = logging.getLogger(__name__)


class SignatureLostWarning(UserWarning):
    """A save of a marked model from which the signature does not read back."""


def report_save(manifest: Manifest, folder: Path) -> None:
    """Log what a save holds, and warn of a mark that is not in it as it should be."""
    read, triggers = manifest.signature, manifest.triggers
    if triggers is not None and triggers.match_rate is not None:
        matches = round(triggers.match_rate * triggers.count)
        log10_p = log10_binomial_tail(matches, triggers.count, 1 / triggers.candidates)
        # Half of what a whole match would give: a set that weak would hardly convince anybody.
        if log10_p > 0.5 * log10_binomial_tail(triggers.count, triggers.count, 1 / triggers.candidates):
            _logger.warning(
                "%s: only %d of %d triggers match: they were not learned, or older weights were loaded back; "
                "raise triggers.last_epochs, triggers.strength (decoupled form) or triggers.weight (gradient form)",
                folder,
                matches,
                triggers.count,
            )
    if read is None:
        _logger.info("%s: encrypted; mark %s", folder, manifest.state)
        return
    numbers = f"bit error rate {read.bit_error_rate:.4f}, log10 p {read.log10_p:.1f}"
    line = f"{folder}: encrypted; mark {manifest.state}, {numbers}"
    if manifest.state == "complete" and (not read.payload_decoded or read.bit_error_rate > 0):
        warnings.warn(
            f"{line}: the signature does not read back exactly from the saved files",
            SignatureLostWarning,
            stacklevel=3,
        )
    _logger.info("%s", line)
