"""Which llama-server arguments a pool may set.

Nothing that opens a port, names a path or a log, or is set by llorch itself is in the list.
"""

from __future__ import annotations

ALLOWED_ENGINE_ARGS: tuple[str, ...] = (
    "--batch-size",
    "--cache-prompt",
    "--cache-ram",
    "--cache-reuse",
    "--cpu-moe",
    "--embeddings",
    "--flash-attn",
    "--frequency-penalty",
    "--jinja",
    "--min-p",
    "--n-cpu-moe",
    "--n-predict",
    "--no-cache-prompt",
    "--no-context-shift",
    "--no-mmap",
    "--no-warmup",
    "--pooling",
    "--presence-penalty",
    "--reasoning-budget",
    "--reasoning-format",
    "--repeat-penalty",
    "--rope-freq-base",
    "--rope-freq-scale",
    "--rope-scale",
    "--rope-scaling",
    "--seed",
    "--split-mode",
    "--swa-full",
    "--temp",
    "--threads",
    "--threads-batch",
    "--top-k",
    "--top-p",
    "--ubatch-size",
    "--yarn-attn-factor",
    "--yarn-beta-fast",
    "--yarn-beta-slow",
    "--yarn-ext-factor",
    "--yarn-orig-ctx",
)


def flag_of(argument: str) -> str | None:
    """The flag of `--flag` or `--flag=value`; None where the argument is a value (`0.8`, `-1`, `on`)."""
    if not argument.startswith("-") or argument[1:2].isdigit():
        return None
    return argument.split("=", 1)[0]


def refused_arguments(arguments: list[str]) -> list[str]:
    """The flags among `arguments` that a pool may not set, in order."""
    return [flag for flag in map(flag_of, arguments) if flag is not None and flag not in ALLOWED_ENGINE_ARGS]


def cel_rule() -> str:
    """The same rule in CEL, for the API server."""
    names = ", ".join(f"'{name}'" for name in ALLOWED_ENGINE_ARGS)
    return f"self.all(a, !a.startsWith('-') || a.matches('^-[0-9]') || a.split('=')[0] in [{names}])"
