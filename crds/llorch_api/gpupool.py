"""GPUPool: a model served by interchangeable replicas. Namespaced; its name is the served model's name."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .engine_args import cel_rule, refused_arguments
from .gpunode import ReplicaState
from .meta import ATOMIC, CONDITION_LIST, ApiModel, Bounded64, Bounded256, Condition, Mebibytes, Name, Resource, Timestamp
from .shape import ModelShape

MAX_REPLICAS = 1000
SOURCE_PATTERN = r"^((file:/|https://|hf:|s3://)[^\s]+|handoff:)$"
SOURCE_HELP = "must be file:/path, https://…, hf:org/repo[/file.gguf][@rev], s3://bucket/key or handoff:"
HANDOFF_SOURCE = "handoff:"
"""Nothing is placed: the pool is served by the engines that handoff files bring."""
HANDOFF_LABEL = "llorch.dev/origin"
"""With value `handoff` on pools that the operator made for handoff files."""
ARGS_HELP = "only llama-server arguments that open no port, path or log may be set; see docs/pools.md"


class ModelSpec(ApiModel):
    """Which model."""

    source: Annotated[
        str,
        Field(
            min_length=5,
            max_length=256,
            description="Where the GGUF is: file:/path (on the nodes), https://…, hf:org/repo[/file.gguf][@rev], "
            "s3://bucket/key; handoff: where engines come by handoff files.",
            json_schema_extra={
                "x-kubernetes-validations": [
                    {
                        "rule": f"self.matches('{SOURCE_PATTERN}')".replace("\\", "\\\\"),
                        "messageExpression": f"'\\'' + self + '\\' {SOURCE_HELP}'",
                    }
                ]
            },
        ),
    ]
    sha256: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            max_length=64,
            description="Expected sha256 of the file, 64 hex digits; of a split model, of its parts in a row. "
            "A file that differs is refused.",
        ),
    ] = None
    aliases: Annotated[
        list[Bounded64],
        Field(
            max_length=16,
            description="Further names that the gateway answers to.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = []

    @field_validator("source")
    @classmethod
    def _source_scheme(cls, value: str) -> str:
        import re

        if not re.match(SOURCE_PATTERN, value):
            raise ValueError(SOURCE_HELP)
        return value


class EngineSpec(ApiModel):
    """How llama-server runs it."""

    kv_cache_type: Annotated[
        Literal["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"],
        Field(description="Type of the KV cache. q8_0 halves it; quantised types need flash attention."),
    ] = "f16"
    args: Annotated[
        list[Bounded256],
        Field(
            max_length=64,
            description="Further llama-server arguments out of an allow-list, for example ['--temp', '0.7'].",
            json_schema_extra={"x-kubernetes-validations": [{"rule": cel_rule(), "message": ARGS_HELP}]},
        ),
    ] = []

    vram_mib: Annotated[
        int | None,
        Field(
            ge=1,
            le=1 << 30,
            description="Memory that one replica takes over all its devices, MiB, where you know better than the model's header. "
            "Needed where the header does not decide it and nothing has measured it; never below what was measured.",
        ),
    ] = None

    @field_validator("args")
    @classmethod
    def _allowed(cls, value: list[str]) -> list[str]:
        if refused := refused_arguments(value):
            raise ValueError(f"{', '.join(refused)}: {ARGS_HELP}")
        return value


class Strategy(StrEnum):
    """pack fills a node before the next one; spread prefers the node with the fewest replicas of the pool."""

    PACK = "pack"
    SPREAD = "spread"


class PlacementSpec(ApiModel):
    """Where replicas may go."""

    node_selector: Annotated[
        dict[str, Bounded64], Field(max_length=16, description="Labels a node must have.", json_schema_extra=ATOMIC)
    ] = {}
    gpu_selector: Annotated[
        dict[str, Bounded64],
        Field(
            max_length=8,
            description="Of a device: name (substring of the product name), minVramMiB, minComputeCapability.",
            json_schema_extra={
                **ATOMIC,
                "x-kubernetes-validations": [
                    {
                        "rule": "self.all(k, k in ['name', 'minVramMiB', 'minComputeCapability'])",
                        "message": "keys are name, minVramMiB and minComputeCapability",
                    },
                    {
                        "rule": "!('minVramMiB' in self) || self['minVramMiB'].matches('^[0-9]+$')",
                        "message": "minVramMiB must be a whole number of MiB",
                    },
                    {
                        "rule": "!('minComputeCapability' in self) || "
                        "self['minComputeCapability'].matches('^[0-9]+([.][0-9]+)?$')",
                        "message": "minComputeCapability must be like 8.6",
                    },
                ],
            },
        ),
    ] = {}
    strategy: Annotated[Strategy, Field(description="pack, or spread over nodes.")] = Strategy.SPREAD
    pin: Annotated[Name | None, Field(description="The one node to run on.")] = None
    avoid: Annotated[list[Name], Field(max_length=64, description="Nodes to keep off.")] = []
    allow_split: Annotated[
        bool, Field(description="Spread one replica over several GPUs of a node where none alone has room.")
    ] = False
    allow_cpu: Annotated[bool, Field(alias="allowCPU", description="Run on nodes without a GPU, in host memory.")] = False

    @field_validator("gpu_selector")
    @classmethod
    def _known_keys(cls, value: dict[str, str]) -> dict[str, str]:
        import re

        if set(value) - {"name", "minVramMiB", "minComputeCapability"}:
            raise ValueError("keys are name, minVramMiB and minComputeCapability")
        if not re.fullmatch("[0-9]+", value.get("minVramMiB", "0")):
            raise ValueError("minVramMiB must be a whole number of MiB")
        if not re.fullmatch(r"[0-9]+([.][0-9]+)?", value.get("minComputeCapability", "0")):
            raise ValueError("minComputeCapability must be like 8.6")
        return value

    @model_validator(mode="after")
    def _pin_or_avoid(self) -> PlacementSpec:
        if self.pin is not None and self.pin in self.avoid:
            raise ValueError("pin names a node that avoid excludes")
        return self


PIN_RULE = {
    "rule": "!has(self.pin) || !has(self.avoid) || !(self.pin in self.avoid)",
    "message": "pin names a node that avoid excludes",
}


class GPUPoolSpec(ApiModel):
    """What users want served."""

    model: Annotated[ModelSpec, Field(description="Which model.")]
    replicas: Annotated[
        int, Field(ge=0, le=MAX_REPLICAS, description="Engines to run.", json_schema_extra={"format": "int32"})
    ] = 1
    slots: Annotated[int, Field(ge=1, le=256, description="Concurrent sequences per replica.")] = 4
    context_tokens: Annotated[int, Field(ge=256, le=1 << 22, description="Context of each slot, tokens.")] = 4096
    engine: Annotated[EngineSpec, Field(description="How llama-server runs it.")] = EngineSpec()
    placement: Annotated[
        PlacementSpec, Field(description="Where replicas may go.", json_schema_extra={"x-kubernetes-validations": [PIN_RULE]})
    ] = PlacementSpec()
    drain_deadline_seconds: Annotated[
        int, Field(ge=0, le=86_400, description="Seconds a request in flight may still take once its replica drains.")
    ] = 120


class ResolvedModel(ApiModel):
    """What the operator read of the model before it placed anything."""

    resolved: Annotated[str, Field(max_length=512, description="The source after redirects and revisions.")] = ""
    digest: Annotated[
        str, Field(max_length=80, description="Identity of the content: sha256:…, etag:…, url:…, sample:… or split:….")
    ] = ""
    size_mib: Annotated[Mebibytes, Field(description="Size of the file, MiB.")] = 0
    shape: Annotated[ModelShape, Field(description="Facts from its header.")] = ModelShape()
    vram_mib: Annotated[
        Mebibytes,
        Field(
            description="What llama-fit-params says one replica takes, MiB, where the header does not decide it; 0: not known."
        ),
    ] = 0


class Endpoint(ApiModel):
    """A replica that gateways may send requests to."""

    node: Annotated[Bounded256, Field(description="Its node.")] = ""
    url: Annotated[Bounded256, Field(description="Base URL of the replica on its agent; /v1 is appended.")] = ""
    state: Annotated[ReplicaState, Field(description="Ready, or Draining while its last requests end.")] = ReplicaState.READY
    slots_total: Annotated[int, Field(ge=0, le=4096, description="Concurrent sequences.")] = 0
    revision: Annotated[Bounded64, Field(description="What it runs.")] = ""


class PoolReplica(ApiModel):
    """One replica, as its agent reports it; for the eye."""

    node: Annotated[Bounded256, Field(description="Its node.")] = ""
    state: Annotated[ReplicaState, Field(description="Its state.")] = ReplicaState.PENDING
    since: Annotated[Timestamp, Field(description="When it entered the state, by the agent's clock.")] = ""
    progress_percent: Annotated[int, Field(ge=0, le=100, description="Of the download while Fetching, in steps of 10.")] = 0


class ConditionReason(StrEnum):
    """Reasons of GPUPool conditions; the most telling one is also status.reason."""

    ALL_READY = "AllReady"
    SCALED_TO_ZERO = "ScaledToZero"
    PARTLY_READY = "PartlyReady"
    NOT_READY = "NotReady"
    RESOLVING = "Resolving"
    MODEL_NOT_AVAILABLE = "ModelNotAvailable"
    UNSUPPORTED_SOURCE = "UnsupportedSource"
    DIGEST_MISMATCH = "DigestMismatch"
    BAD_MODEL = "BadModel"
    NO_NODES = "NoNodes"
    DOES_NOT_FIT = "DoesNotFit"
    ALL_PLACED = "AllPlaced"
    ROLLING_OUT = "RollingOut"
    STEADY = "Steady"
    REPLICA_FAILED = "ReplicaFailed"


class GPUPoolStatus(ApiModel):
    """The operator writes all of it but replicas, whose entries belong to the agents of their nodes."""

    model: Annotated[ResolvedModel | None, Field(description="What the model turned out to be.", json_schema_extra=ATOMIC)] = None
    endpoints: Annotated[
        dict[str, Endpoint],
        Field(
            max_length=MAX_REPLICAS,
            description="Replicas in routing, by id. Gateways read this and nothing else.",
            json_schema_extra=ATOMIC,
        ),
    ] = {}
    replicas: Annotated[
        dict[str, PoolReplica], Field(max_length=64, description="Replicas by id, as their agents report them; none above 64.")
    ] = {}
    desired: Annotated[int, Field(ge=0, description="Replicas wanted.", json_schema_extra={"format": "int32"})] = 0
    current: Annotated[int, Field(ge=0, description="Replicas placed.", json_schema_extra={"format": "int32"})] = 0
    ready: Annotated[int, Field(ge=0, description="Replicas that serve.", json_schema_extra={"format": "int32"})] = 0
    nodes: Annotated[int, Field(ge=0, description="Nodes that hold a replica.")] = 0
    slots_total: Annotated[int, Field(ge=0, description="Slots of the ready replicas.")] = 0
    unplaced: Annotated[int, Field(ge=0, description="Replicas that fit nowhere.")] = 0
    selector: Annotated[Bounded256, Field(description="Label selector, for the scale subresource.")] = ""
    reason: Annotated[Bounded64, Field(description="The one reason that matters, for the STATUS column.")] = ""
    conditions: Annotated[
        list[Condition],
        Field(max_length=8, description="Available, Progressing, Placed.", json_schema_extra=CONDITION_LIST),
    ] = []
    observed_generation: Annotated[int, Field(ge=0, description="Generation of spec that the operator has acted on.")] = 0


class GPUPool(Resource):
    """A model served by interchangeable replicas on GPU nodes. Its name is the model name that clients ask for."""

    KIND: ClassVar[str] = "GPUPool"
    PLURAL: ClassVar[str] = "gpupools"
    NAMESPACED: ClassVar[bool] = True
    CRD: ClassVar[dict[str, Any]] = {
        "singular": "gpupool",
        "shortNames": ["lgp"],
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.current",
            "labelSelectorPath": ".status.selector",
        },
        "columns": [
            ("Model", "string", ".spec.model.source", 0, "Where the model comes from."),
            ("Desired", "integer", ".status.desired", 0, "Replicas wanted."),
            ("Ready", "integer", ".status.ready", 0, "Replicas that serve."),
            ("Slots", "integer", ".status.slotsTotal", 0, "Slots of the ready replicas."),
            ("Nodes", "integer", ".status.nodes", 0, "Nodes that hold a replica."),
            ("Status", "string", ".status.reason", 0, "The one reason that matters."),
            ("Age", "date", ".metadata.creationTimestamp", 0, "Age of the object."),
        ],
    }

    kind: str = "GPUPool"
    spec: Annotated[GPUPoolSpec, Field(description="What users want served.")]
    status: Annotated[GPUPoolStatus, Field(description="What the operator and the agents report.")] = GPUPoolStatus()
