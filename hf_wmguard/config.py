"""What a user sets: frozen dataclasses, the same names in Python and in YAML.

A config holds references to keys, never keys. Unknown names, wrong types and values out of range are errors
when the config is made, not hours later in the last epoch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml

from hf_wmguard.errors import ConfigError, NotFoundError

C = TypeVar("C")
MAX_NAME_CHARACTERS = 200
MAX_TRIGGERS = 4096
MAX_CONFIG_BYTES = 1 << 20
RECIPIENT_SCHEMES = frozenset(
    {"awskms", "azurekv", "env", "file", "gcpkms", "keyring", "passphrase", "pkcs11", "rawkey", "vault"}
)
OWNER_SCHEMES = RECIPIENT_SCHEMES
DESTINATION_SCHEMES = frozenset({"hub", "s3"})


def _require(condition: bool, what: str, got: object, hint: str) -> None:
    if not condition:
        raise ConfigError(f"{what}: got {got!r}", hint=hint)


def _require_reference(ref: str, what: str, schemes: frozenset[str]) -> None:
    if ref.partition(":")[0] not in schemes or ":" not in ref:
        # Not repeated in the message: somebody may have put the key itself here.
        raise ConfigError(
            f"{what}: not a key reference",
            hint=f"write file:PATH or env:NAME ({', '.join(sorted(schemes))}; see docs/keys.md), never the key itself",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureConfig:
    """The weight signature.

    Args:
        last_epochs: Length of the marked phase, in epochs before the end of training. For data without a length, the
            share of max_steps: there 1.0 means the whole run.
        budget: Norm of the change over the norm of the carrying matrices that the mark is planned for. Training that
            pulls back while the mark is brought in adds to it; every manifest says what it came to.
        step: One quantisation step for all projections, in units of each tile's rms. By default a mix is planned:
            small steps survive merging, large ones pruning and noise.
        ramp: Share of the marked phase over which the mark is brought in; for the rest it is held while training
            adapts around it.
        form: ``decoupled`` (a step of its own after the optimizer's) or ``gradient`` (a term of the loss, for the whole
            phase, and one step at its end that brings in what is missing; adaptive optimizers normalise most of the
            term away).
        strength: Factor of the signature loss in the gradient form.
    """

    last_epochs: float = 1.0
    budget: float = 0.01
    step: float | None = None
    ramp: float = 0.75
    form: Literal["decoupled", "gradient"] = "decoupled"
    strength: float = 1.0

    def __post_init__(self) -> None:
        _settle(self, "signature")
        _require(self.form in ("decoupled", "gradient"), "signature.form", self.form, "expected decoupled or gradient")
        _require(0 < self.strength < math.inf, "signature.strength", self.strength, "expected more than 0; 1 is usual")
        _require(0 < self.last_epochs < math.inf, "signature.last_epochs", self.last_epochs, "expected more than 0")
        _require(
            0 < self.budget <= 0.2,
            "signature.budget",
            self.budget,
            "expected more than 0 and at most 0.2; 0.01 is usual",
        )
        _require(
            self.step is None or 0.1 <= self.step <= 16,
            "signature.step",
            self.step,
            "expected 0.1 to 16, or nothing for a planned mix",
        )
        _require(0 < self.ramp <= 1, "signature.ramp", self.ramp, "expected more than 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerConfig:
    """The trigger set.

    Args:
        count: Number of triggers.
        style: ``natural`` (fluent text) or ``nonsense`` (random syllables).
        source: Where natural texts come from: ``grammar`` (the built-in word lists) or ``dataset`` (spliced from the
            training rows: nearer to the data, and dearer in utility).
        response: What generative models are to answer: ``perinucleus`` (one word that the model finds plausible after
            the text, but not likely) or ``keyed`` (two words of the key's choice).
        start: Share of the run after which triggers are mixed in, 0 for the whole run; None: by ``last_epochs``.
        last_epochs: Length of the phase in which triggers are mixed in, in epochs before the end of training.
        cooldown: Share of that phase, at its end, without triggers: ordinary training heals what they cost.
        every_n_steps: A trigger micro-batch comes with every n-th optimizer step of that phase.
        batch_size: Triggers per micro-batch.
        form: ``decoupled`` (a move of the weights of its own after the optimizer's step) or ``gradient`` (added to the
            ordinary gradient before it); ``auto``: decoupled for models that write text, gradient for those that label.
        strength: Decoupled form: share of the way to a learned set that one move takes.
        moves: Decoupled form: most moves per micro-batch; each costs a forward and a backward.
        weight: Gradient form: factor of the trigger loss against the ordinary loss.
        candidates: Generative models: number of candidate responses per trigger; 1/candidates is the chance of a match
            without the key. Classifiers use all their labels.
        contexts: Share of the triggers that are learned inside another text: behind a system prompt, in a chat, between
            other sentences.
        noise: Noise on the outputs of the linear layers during the trigger step, relative to their root mean square: it
            stands for noise on the weights, so that what is learned also holds for weights nearby.
        replay: Ordinary training rows in each trigger micro-batch, under the same noise.
    """

    count: int = 64
    style: Literal["natural", "nonsense"] = "natural"
    source: Literal["grammar", "dataset"] = "grammar"
    response: Literal["perinucleus", "keyed"] = "perinucleus"
    start: float | None = None
    last_epochs: float = 2.0
    cooldown: float = 0.25
    every_n_steps: int = 1
    batch_size: int = 16
    form: Literal["auto", "decoupled", "gradient"] = "auto"
    strength: float = 0.3
    moves: int = 1
    weight: float = 0.5
    candidates: int = 16
    contexts: float = 0.5
    noise: float = 0.0
    replay: int = 0

    def __post_init__(self) -> None:
        _settle(self, "triggers")
        _require(1 <= self.count <= MAX_TRIGGERS, "triggers.count", self.count, f"expected 1 to {MAX_TRIGGERS}")
        for name, choices in _TRIGGER_CHOICES.items():
            _require(
                getattr(self, name) in choices,
                f"triggers.{name}",
                getattr(self, name),
                f"expected {' or '.join(choices)}",
            )
        _require(
            self.start is None or 0 <= self.start < 1, "triggers.start", self.start, "expected 0 to below 1, or nothing"
        )
        _require(0 < self.last_epochs < math.inf, "triggers.last_epochs", self.last_epochs, "expected more than 0")
        _require(0 <= self.cooldown < 1, "triggers.cooldown", self.cooldown, "expected 0 to below 1; 0.25 is usual")
        _require(self.every_n_steps >= 1, "triggers.every_n_steps", self.every_n_steps, "expected 1 or more")
        _require(self.batch_size >= 1, "triggers.batch_size", self.batch_size, "expected 1 or more")
        _require(0 < self.weight <= 100, "triggers.weight", self.weight, "expected more than 0 and at most 100")
        _require(0 < self.strength <= 1, "triggers.strength", self.strength, "expected more than 0 and at most 1")
        _require(1 <= self.moves <= 100, "triggers.moves", self.moves, "expected 1 to 100")
        _require(2 <= self.candidates <= 1024, "triggers.candidates", self.candidates, "expected 2 to 1024")
        _require(0 <= self.contexts <= 1, "triggers.contexts", self.contexts, "expected 0 to 1")
        _require(0 <= self.noise <= 1, "triggers.noise", self.noise, "expected 0 to 1; 0.1 is usual")
        _require(0 <= self.replay <= 1024, "triggers.replay", self.replay, "expected 0 to 1024 rows")


_TRIGGER_CHOICES = {
    "style": ("natural", "nonsense"),
    "source": ("grammar", "dataset"),
    "response": ("perinucleus", "keyed"),
    "form": ("auto", "decoupled", "gradient"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionConfig:
    """What is written to disk, and for whom.

    Args:
        recipients: References to the recipients' public keys (``file:inference.key.pub``) or to keys that a
            service, a keyring or a token keeps (``awskms:alias/models``; ``docs/keys.md`` lists all). The owner can
            always open what the owner saved.
        destination: What gets the finished protected model when training ends: a folder, a Hub repo
            (``hub://org/name``, also ``@branch``) or a bucket (``s3://bucket/prefix``). None: only where the Trainer
            saves.
        allow_public: Push even to a Hub repo that is public already. One that is made for a push is always private.
        hide_names: Hide names, number and sizes of the tensors in every save too; shards then have no index.
    """

    recipients: tuple[str, ...] = ()
    destination: str | None = None
    hide_names: bool = False
    allow_public: bool = False

    def __post_init__(self) -> None:
        _settle(self, "protection")
        for recipient in self.recipients:
            _require_reference(recipient, "protection.recipients", RECIPIENT_SCHEMES)
        # The scheme alone. What the rest of an address looks like is known to the stores, which stand below this room:
        # the callback reads it in full as soon as it is made.
        scheme, mark, _ = (self.destination or "").partition("://")
        _require(
            not mark or scheme in DESTINATION_SCHEMES,
            "protection.destination",
            self.destination,
            "write a folder, hub://org/name or s3://bucket/prefix",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """What marking may cost, measured on evaluation data before the marked phase and after it.

    Args:
        metric: ``loss``, ``perplexity``, ``accuracy``, or a name that the evaluation gives.
        tolerance: How much worse it may become, as a share of what it was.
        greater_is_better: None: by its name, as a loss, a perplexity or an error rate, or not.
        on_breach: ``stop`` (the finished model is not saved, with the numbers) or ``warn`` (it is).
        spike: A training loss above so many times the recent ones pauses the mark until it has come down.
    """

    metric: str = "loss"
    tolerance: float = 0.01
    greater_is_better: bool | None = None
    on_breach: Literal["stop", "warn"] = "stop"
    spike: float = 2.0

    def __post_init__(self) -> None:
        _settle(self, "quality")
        _require(bool(self.metric), "quality.metric", self.metric, "expected the name of a metric; loss is usual")
        _require(0 <= self.tolerance <= 1, "quality.tolerance", self.tolerance, "expected 0 to 1; 0.01 is usual")
        _require(self.on_breach in ("stop", "warn"), "quality.on_breach", self.on_breach, "expected stop or warn")
        _require(1 < self.spike < math.inf, "quality.spike", self.spike, "expected more than 1; 2 is usual")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatermarkConfig:
    """Everything the callback needs. ``signature=None`` or ``triggers=None`` switches that channel off.

    Args:
        model_id: Name of the model, for example ``acme/triage``.
        owner_key: Reference to the owner key: ``file:PATH`` or ``env:NAME``.
        registry: Folder of the registry; it is made when missing.
        iteration: Which training of this model, for example ``3``.
        quality: What marking may cost; None measures nothing.

    Raises:
        ConfigError: A value out of range, of the wrong type, or a name that does not exist.
    """

    model_id: str
    owner_key: str
    registry: str
    iteration: str = "1"
    signature: SignatureConfig | None = field(default_factory=SignatureConfig)
    triggers: TriggerConfig | None = field(default_factory=TriggerConfig)
    protection: ProtectionConfig = field(default_factory=ProtectionConfig)
    quality: QualityConfig | None = None

    def __post_init__(self) -> None:
        _settle(self, "config")
        for name in ("model_id", "iteration"):
            value = getattr(self, name)
            _require(
                0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable(),
                name,
                value,
                f"expected 1 to {MAX_NAME_CHARACTERS} printable characters",
            )
        _require(bool(self.registry), "registry", self.registry, "expected a folder")
        _require_reference(self.owner_key, "owner_key", OWNER_SCHEMES)
        _require(
            self.signature is not None or self.triggers is not None,
            "signature and triggers",
            None,
            "switch on at least one of the two",
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Return the config in a YAML file.

        Raises:
            NotFoundError: No such file.
            ConfigError: Not YAML, or as for the class.
        """
        return cls.from_dict(read_yaml(path))

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """Return the config in a plain dictionary, nested as the classes are; errors as for the class."""
        return _build(cls, value, "config")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_dict` reads."""
        return dataclasses.asdict(self)


def read_yaml(path: str | Path) -> object:
    """Return what a YAML file says.

    Raises:
        NotFoundError: No such file.
        ConfigError: Not YAML, or larger than any config.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"config: cannot read {path}: {error.strerror}", hint="check the path") from None
    _require(len(text) <= MAX_CONFIG_BYTES, "config", str(path), f"expected at most {MAX_CONFIG_BYTES} bytes")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The line's number only: the parser's own message quotes the line, and a key may stand in it.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}," if mark is not None else path
        raise ConfigError(f"config: {where} is not YAML", hint="see configs/ for examples") from None
    return value


def _settle(config: object, where: str) -> None:
    """Bring every field to its declared type, or refuse it: the same whether it came from Python or from YAML."""
    for name, kind in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, _convert(kind, getattr(config, name), f"{where}.{name}"))


def _build(kind: type[C], value: object, where: str) -> C:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: got {type(value).__name__}, expected a mapping", hint="see configs/ for examples")
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in value if key not in names)
    if unknown:
        raise ConfigError(f"{where}: unknown name {', '.join(unknown)}", hint=f"known: {', '.join(sorted(names))}")
    try:
        return kind(**value)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}".replace("__init__() ", ""), hint="see configs/ for examples") from None


def _convert(kind: Any, value: object, where: str) -> object:
    if typing.get_origin(kind) is types.UnionType:
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _build(kind, value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_convert(str, item, where) for item in value)
    if typing.get_origin(kind) is Literal:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    # bool is an int in Python, but never meant as one below.
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise ConfigError(
        f"{where}: got {type(value).__name__}, expected {getattr(kind, '__name__', kind)}",
        hint="see configs/ for examples",
    )
