"""The envelope a user writes, as types: base, surgery, tasks, export.

A surgery item is `{technique: options}`. Its technique is found first and its options are validated with that one
class, so the set of techniques stays open and a mistake is told once, in that technique's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    SerializeAsAny,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from surgeon.errors import SpecError
from surgeon.registry import technique
from surgeon.spec.problems import Loc
from surgeon.spec.source import Origin, dump

if TYPE_CHECKING:
    from surgeon.passes import Pass

HeadName = Literal[
    "sequence-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "image-classification",
    "audio-classification",
    "feature-extraction",
]
TASK_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Part(BaseModel):
    """A part of a spec: frozen, and nothing in it that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSpec(Part):
    """The pretrained model that every task shares."""

    model: StrictStr | None = Field(
        default=None,
        min_length=1,
        description="A folder, a `.gguf` file, `package:NAME/…` for one inside an installed package, or a hub id.",
    )
    config: dict[StrictStr, JsonValue] | None = Field(
        default=None,
        description="A configuration instead: a base of that shape with random weights, drawn from `seed`.",
    )
    head: HeadName = Field(default="sequence-classification", description="What the model is loaded for.")
    revision: StrictStr | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Type of the weights in memory."
    )
    trust_remote_code: StrictBool = Field(
        default=False, description="Run Python code that the model's own folder holds."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise PydanticCustomError("one_of", "needs either `model` or `config`")
        return self


def _labels(value: object) -> object:
    """Names or a number of labels; a tuple, so that a spec stays frozen."""
    names: tuple[str, ...] = ()
    count: int | None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        count = value
    elif isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
        names, count = tuple(value), len(value)
    else:
        what = 'must be a number or a list of words, got {got}; numbers as labels are quoted: ["1", "2"]'
        raise PydanticCustomError("labels", what, {"got": repr(value)[:60]})
    if count is not None and count < 2:
        raise PydanticCustomError("labels", "must be at least 2 labels, got {count}", {"count": count})
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PydanticCustomError("labels", "must differ from each other; twice: {twice}", {"twice": ", ".join(twice)})
    return names or count


Labels = Annotated[
    tuple[StrictStr, ...] | StrictInt | None,
    BeforeValidator(_labels),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 2, "uniqueItems": True},
                {"type": "integer", "minimum": 2},
                {"type": "null"},
            ]
        }
    ),
]


class TaskSpec(Part):
    """One task: what it tells apart."""

    labels: Labels = Field(
        default=None,
        description="The labels' names, or how many there are; without it the task keeps the base's own head.",
    )


def _task_name(name: str) -> str:
    if not TASK_NAME.fullmatch(name):
        raise PydanticCustomError(
            "task_name",
            "cannot be a task's name: it becomes a file name, 1 to 100 of a-z, A-Z, 0-9, '_', '-' and (not first) '.'",
        )
    return name


TaskName = Annotated[
    StrictStr, AfterValidator(_task_name), Field(json_schema_extra={"pattern": f"^{TASK_NAME.pattern}$"})
]
Task = Annotated[TaskSpec, BeforeValidator(lambda value: {} if value is None else value)]


class ExportSpec(Part):
    """What the build holds."""

    modes: tuple[Literal["switch", "mixed"], ...] = Field(
        default=("switch",),
        description="`switch`: one task a call, chosen when the model is run. `mixed`, beside it: a second graph over "
        "the same weights, in which every row of a batch has a task of its own, and a text as many rows as tasks; "
        "a decoder with `generate` writes texts of several tasks together.",
    )
    opset: StrictInt = Field(default=20, ge=18, le=23, description="ONNX operator set.")
    weights: Literal["copy", "link", "reference", "base-rounded", "float32", "int8", "int4"] = Field(
        default="copy",
        description="How the ONNX model holds the base's weights. `copy`: in a file of its own, as the base's does, in "
        "half precision or in a GGUF file's blocks of few bits. `link`: in the checkpoint's files, hard-linked into "
        "the build. `reference`: in the checkpoint's files, where they are. `float32`: a copy, all in fp32. "
        "`base-rounded`: a GGUF file's blocks, multiplied with inputs rounded to 8 bits: faster, approximate, and a "
        "row may change with the number of rows beside it. `int8`, `int4`: in fewer bits, another base than the one "
        "that is trained on, with approximate answers.",
    )

    generate: StrictBool = Field(
        default=False,
        description="Write texts: the ONNX model takes and gives the cache of earlier tokens' keys and values, and "
        "answers for the last token alone. An encoder-decoder gets graphs of its two halves beside the whole.",
    )

    cache: Literal["auto", "grown"] = Field(
        default="auto",
        description="The cache of a graph that writes texts. `auto`: one buffer that ONNX Runtime writes in place, "
        "where that is exact for this base and surgery, else `grown`: a longer one made at every token.",
    )

    @field_validator("modes")
    @classmethod
    def _once(cls, modes: tuple[str, ...]) -> tuple[str, ...]:
        if not modes or len(set(modes)) < len(modes):
            raise PydanticCustomError("modes", "must name at least one mode, and each once")
        if "switch" not in modes:
            raise PydanticCustomError("modes", "must name `switch` too: the graph whose weights the others share")
        return modes


@cache
def _adapter(known: type[Pass]) -> TypeAdapter[dict[str, BaseModel]]:
    """Validates `{name: options}` with one class, so that the name stands in the path of every mistake."""
    return TypeAdapter(dict[str, known])  # type: ignore[valid-type]


def _item(value: object) -> BaseModel:
    """A surgery item as its technique's pass. Raises ValidationError with the technique's name in front of the path."""
    if isinstance(value, BaseModel):
        name, options = getattr(type(value), "name", type(value).__name__), value
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
    else:
        raise PydanticCustomError("item", "must be one technique with its options, such as `- lora: {rank: 8}`")
    try:
        known = technique(str(name))
        return _adapter(known).validate_python({name: {} if options is None else options})[name]
    except SpecError as error:
        context = {"what": error.what, "there_is": error.there_is, "try_": error.try_}
        mistake = PydanticCustomError("technique", "{what}", context)
        raise ValidationError.from_exception_data(
            "surgery", [InitErrorDetails(type=mistake, loc=(str(name),), input=options)]
        ) from error


class Spec(Part):
    """What to do to which base for which tasks."""

    base: BaseSpec | None = Field(
        default=None, description="The model to operate on; absent where one in hand is given."
    )
    surgery: tuple[Annotated[SerializeAsAny[BaseModel], BeforeValidator(_item)], ...] = Field(
        default=(), description="Techniques with their options, in the order they are applied."
    )
    tasks: dict[TaskName, Task] = Field(default={}, description="The tasks, by name.")
    export: ExportSpec = Field(default=ExportSpec(), description="What the build holds.")
    seed: StrictInt = Field(default=0, ge=0, lt=2**32, description="Seed of every random number.")

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @field_serializer("surgery")
    def _items(self, surgery: tuple[BaseModel, ...]) -> list[dict[str, Any]]:
        return [{step.name: step.model_dump(mode="json")} for step in self.steps]

    @property
    def steps(self) -> tuple[Pass, ...]:
        """The surgery's passes, in order."""
        return cast("tuple[Pass, ...]", self.surgery)

    def to_yaml(self) -> str:
        """The spec as resolved: every option written out; reading it gives this spec, and the same bytes again."""
        return dump(self.model_dump(mode="json", exclude_none=True))

    def locate(self, path: Loc, *, key: bool = False) -> str | None:
        """`file:line:column` of an option such as `("surgery", 1, "lora", "where")`; a dotted path where no file is.

        A path that the user left to its default is answered with the nearest thing around it that is written.
        `key` asks for the word in front of the colon.
        """
        return self._origin.where(path, key=key)
