"""Versions of the tools that a conversion depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


def tool_versions() -> dict[str, str]:
    """Every tool with its version."""
    return {name: tool_version(name) for name in TOOLS}


def tool_version(name: str) -> str:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
