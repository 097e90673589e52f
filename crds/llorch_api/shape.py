"""What placement needs to know of a model, as its GGUF header tells it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .meta import ApiModel, Bounded64, Mebibytes

Count = Annotated[int, Field(ge=0, le=1 << 40)]


class ModelShape(ApiModel):
    """The few integers of a GGUF header from which memory needs follow for any context, slots and KV type."""

    architecture: Annotated[Bounded64, Field(description="general.architecture of the GGUF, for example llama.")] = ""
    layers: Annotated[Count, Field(description="Number of transformer blocks.")] = 0
    embedding_length: Annotated[Count, Field(description="Width of the residual stream.")] = 0
    vocab_size: Annotated[Count, Field(description="Tokens in the vocabulary.")] = 0
    context_length: Annotated[Count, Field(description="Context the model was trained for, in tokens.")] = 0
    weights_mib: Annotated[
        Mebibytes, Field(description="Weights that live on the devices when all layers are offloaded, MiB.")
    ] = 0
    host_mib: Annotated[Mebibytes, Field(description="Weights that stay in host memory (the token embedding), MiB.")] = 0
    kv_key_elements: Annotated[Count, Field(description="Key elements per token, summed over full-attention layers.")] = 0
    kv_value_elements: Annotated[Count, Field(description="Value elements per token, summed over full-attention layers.")] = 0
    swa_key_elements: Annotated[Count, Field(description="Key elements per token, summed over sliding-window layers.")] = 0
    swa_value_elements: Annotated[Count, Field(description="Value elements per token, summed over sliding-window layers.")] = 0
    swa_window: Annotated[Count, Field(description="Sliding window in tokens; 0 where no layer slides.")] = 0
    caveat: Annotated[
        str, Field(max_length=256, description="Why the header alone does not decide the memory need; empty where it does.")
    ] = ""
