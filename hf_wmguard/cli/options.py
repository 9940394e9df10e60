"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

IDENTITY_HELP = "file:PATH, env:NAME, keyring:, passphrase:, awskms:, vault: and more (docs/keys.md)"
OwnerKeyOption = Annotated[
    str,
    typer.Option(
        "--owner-key", help="Reference to the owner key: file:PATH, env:NAME, keyring:SERVICE/NAME, or KEY@file:PATH."
    ),
]
RegistryOption = Annotated[Path, typer.Option("--registry", help="Folder of the owner's registry.")]
ModelIdOption = Annotated[str | None, typer.Option("--model-id", help="Only this model's commitments.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
AlphaOption = Annotated[float, typer.Option("--alpha-log10", help="Level of the verdict, log10 of p, below 0.")]
IdentityOption = Annotated[
    str | None, typer.Option("--identity", help=f"What opens a protected folder: {IDENTITY_HELP}.")
]
SignerOption = Annotated[
    str | None,
    typer.Option("--signer", help="Reference to the owner's public key that must have signed, file:owner.key.pub."),
]
BudgetOption = Annotated[
    float, typer.Option("--budget", help="Norm of the change over the norm of the matrices that carry it.")
]
