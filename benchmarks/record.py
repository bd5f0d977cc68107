"""The result file: one record per case, provider, dropout and pass. schema.md documents it."""

import json
import sys
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.shapes import Case, flops
from benchmarks.timing import Quantiles, paired_interval, paired_ratio

SCHEMA = "lora_fused.benchmarks"
SCHEMA_VERSION = 2

OK, WRONG, ERROR, NOT_SERVED = "ok", "wrong", "error", "not served"


@dataclass
class Record:
    """What one provider did in one case and pass. Times are None where it was not timed."""

    machine: str
    versions: dict[str, str]
    commit: str
    threads: int
    provider: str
    model: str
    layer: str
    dtype: str
    M: int
    K: int
    N: int
    R: int
    bias: bool
    fan_in_fan_out: bool
    dropout: float
    pass_: str
    status: str
    message: str
    error_ratio: float | None
    error_ratios: dict[str, float]
    peak_bytes: int | None
    held_bytes: int | None
    repeats: int | None = None
    samples_us: list[float] = field(default_factory=list)
    q10_us: float | None = None
    q25_us: float | None = None
    median_us: float | None = None
    q75_us: float | None = None
    q90_us: float | None = None
    tax: float | None = None
    tax_q25: float | None = None
    tax_q75: float | None = None
    tax_low: float | None = None
    tax_high: float | None = None
    ratio_to_peft: float | None = None
    gflops: float | None = None

    @property
    def timed(self) -> bool:
        return self.median_us is not None

    @property
    def layer_key(self) -> str:
        return f"{self.model}.{self.layer}"

    @property
    def case_key(self) -> tuple[str, str, int, int]:
        return (self.layer_key, self.dtype, self.M, self.R)

    def set_times(
        self,
        case: Case,
        lora: bool,
        repeats: int,
        samples: list[float],
        frozen: list[float],
        peft: list[float] | None,
    ) -> None:
        """Fills in the statistics; all samples are of the same rounds."""
        times, tax = Quantiles.of(samples), paired_ratio(samples, frozen)
        self.repeats, self.samples_us = repeats, [round(s, 3) for s in samples]
        self.q10_us, self.q25_us, self.median_us = times.q10, times.q25, times.median
        self.q75_us, self.q90_us = times.q75, times.q90
        self.tax, self.tax_q25, self.tax_q75 = tax.median, tax.q25, tax.q75
        interval = paired_interval(samples, frozen)
        self.tax_low, self.tax_high = interval.low, interval.high
        self.ratio_to_peft = paired_ratio(samples, peft).median if peft else None
        work = flops(case.layer, case.M, case.R if lora else 0, self.pass_)
        self.gflops = work / times.median / 1000


@dataclass
class SuiteRecord:
    """What one provider did in one item of a suite other than `layer`, all providers paired.

    `ratio` is time ÷ time of the provider `base` in the same rounds, with its bootstrap interval.
    `flops` and `bytes_moved` are the least that the item takes, from which `gflops` and `gbytes`
    follow; `roof_percent` is the share of the time that the slower of the two roofs would allow.
    """

    suite: str
    item: str
    shape: dict[str, int]
    dtype: str
    pass_: str
    provider: str
    base: str
    status: str
    message: str
    error_ratio: float | None = None
    peak_bytes: int | None = None
    held_bytes: int | None = None
    resident_bytes: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None
    repeats: int | None = None
    samples_us: list[float] = field(default_factory=list)
    q25_us: float | None = None
    median_us: float | None = None
    q75_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    roof_percent: float | None = None

    @property
    def timed(self) -> bool:
        return self.median_us is not None

    def set_times(self, repeats: int, samples: list[float], base: list[float]) -> None:
        """Fills in the statistics; both lists are of the same rounds."""
        times, ratio = Quantiles.of(samples), paired_interval(samples, base)
        self.repeats, self.samples_us = repeats, [round(s, 3) for s in samples]
        self.q25_us, self.median_us, self.q75_us = times.q25, times.median, times.q75
        self.ratio, self.ratio_low, self.ratio_high = ratio.median, ratio.low, ratio.high
        self.gflops = self.flops / times.median / 1000 if self.flops else None
        self.gbytes = self.bytes_moved / times.median / 1000 if self.bytes_moved else None


@dataclass
class MemoryRecord:
    """One provider in the memory section, measured in a process of its own."""

    provider: str
    peak_bytes: int
    held_bytes: int
    resident_bytes: int | None


@dataclass
class Results:
    """A run: where and how it was made, its records, and what was left out."""

    created: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    providers: list[dict[str, Any]]
    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    memory: list[MemoryRecord] = field(default_factory=list)
    suites: list[SuiteRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        for record in document["records"] + document["suites"]:
            record["pass"] = record.pop("pass_")
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "Results":
        """ValueError for what is no such file, field by field."""
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object, got {type(document).__name__}")
        if document.get("schema") != SCHEMA or document.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"expected a {SCHEMA} file of version {SCHEMA_VERSION}, got "
                f"{document.get('schema')!r} version {document.get('schema_version')!r}"
            )
        content = {k: v for k, v in document.items() if k not in ("schema", "schema_version")}
        results = _checked(cls, content, "results")
        results.records = _passes(Record, content["records"], "records")
        results.suites = _passes(SuiteRecord, content["suites"], "suites")
        results.memory = [
            _checked(MemoryRecord, m, f"memory[{i}]") for i, m in enumerate(content["memory"])
        ]
        return results

    def save(self, path: Path) -> None:
        """Writes the whole file or nothing: a run that is killed leaves the last complete one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls.from_dict(json.loads(path.read_text()))


def load_or_exit(path: Path, program: str) -> Results:
    """The file, for a command: what is wrong with it ends the program with a sentence."""
    try:
        return Results.load(path)
    except OSError as error:
        sys.exit(f"{program}: {path}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"{program}: {path}: {error}")


T = typing.TypeVar("T")


def _passes(cls: type[T], records: list[Any], where: str) -> list[T]:
    """`pass` is a word of Python's; the field of the dataclass is `pass_`."""
    return [
        _checked(cls, _renamed(record) if isinstance(record, dict) else record, f"{where}[{i}]")
        for i, record in enumerate(records)
    ]


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    return {"pass_" if name == "pass" else name: value for name, value in record.items()}


def _checked(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `cls`, after checking every field's presence and JSON type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{where}: unknown fields {unknown}")
    if absent := sorted(names - set(values)):
        raise ValueError(f"{where}: missing fields {absent}")
    for name, value in values.items():
        if not isinstance(value, _json_types(hints[name])):
            raise ValueError(f"{where}.{name}: expected {hints[name]}, got {value!r}")
    return cls(**values)


def _json_types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(t for arm in typing.get_args(hint) for t in _json_types(arm))
    plain = typing.get_origin(hint) or hint
    return (float, int) if plain is float else (plain,)
