"""Put the survival benchmark's folder on the path: its models, data, Trainer and adapters are used here too."""

from __future__ import annotations

import sys
from pathlib import Path

SURVIVAL = Path(__file__).resolve().parents[1] / "survival"
# Behind this folder, where modules of the same name are.
sys.path.append(str(SURVIVAL))
