"""What both resources share: the envelope, metadata, conditions, and how a model maps to JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "llorch.dev"
VERSION = "v1alpha1"

Mebibytes = Annotated[int, Field(ge=0, le=1 << 40)]
"""A size in MiB."""
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A DNS label."""
Timestamp = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
"""An RFC 3339 time, for display: no decision compares it with another clock."""
Bounded64 = Annotated[str, Field(max_length=64)]
Bounded256 = Annotated[str, Field(max_length=256)]


def camel(name: str) -> str:
    """`vram_free_mib` -> `vramFreeMiB`: camelCase with the unit spelt as users write it."""
    return to_camel(name).replace("Mib", "MiB")


class ApiModel(BaseModel):
    """A piece of a resource. Unknown fields are ignored, so that an old reader survives a newer writer."""

    model_config = ConfigDict(alias_generator=camel, populate_by_name=True, extra="ignore", frozen=True, use_enum_values=False)

    def to_json(self) -> dict[str, Any]:
        """The JSON form: camelCase names, enums by value, unset fields and nulls left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)

    def to_compact_json(self) -> dict[str, Any]:
        """The JSON form without what equals its default: every reader fills that in, and each byte is stored per heartbeat."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


class OwnerReference(ApiModel):
    """Kubernetes deletes an object with its owner."""

    api_version: str
    kind: str
    name: str
    uid: str


class ObjectMeta(ApiModel):
    """The part of Kubernetes' ObjectMeta that llorch reads or writes."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    owner_references: list[OwnerReference] = Field(default_factory=list)


class ConditionStatus(StrEnum):
    """Unknown means not observed; False is what was observed."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(ApiModel):
    """One aspect of an object's state, as `kubectl wait` and `kubectl describe` read it."""

    type: Annotated[str, Field(max_length=64, description="Name of the aspect, for example Ready.")]
    status: Annotated[ConditionStatus, Field(description="True, False, or Unknown when it was not observed.")]
    reason: Annotated[str, Field(max_length=64, description="One CamelCase word for programs.")]
    message: Annotated[str, Field(max_length=4096, description="The same for people, with the figures.")] = ""
    last_transition_time: Annotated[Timestamp, Field(description="When status last changed.")]
    observed_generation: Annotated[int, Field(ge=0, description="The spec's generation that this speaks of.")] = 0


CONDITION_LIST: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
ATOMIC: dict[str, Any] = {"x-kubernetes-map-type": "atomic"}
"""For maps and objects that one writer owns whole: halves managedFields."""


class Resource(ApiModel):
    """A Kubernetes object. Subclasses narrow `spec` and `status` and carry their resource's names."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]
    NAMESPACED: ClassVar[bool]

    api_version: str = f"{GROUP}/{VERSION}"
    kind: str = ""
    metadata: ObjectMeta
