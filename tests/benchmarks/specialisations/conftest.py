"""A count of what kernels load and store in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def traffic(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each global load and store."""
    if triton_device != "cpu":
        pytest.skip("the bytes are counted in Triton's interpreter")
    from triton.runtime import interpreter

    counted: list[int] = []
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        counted.append(int(mask.data.sum()) * width)

    def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    return counted
