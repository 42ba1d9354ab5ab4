from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastldm.outputs import BaseOutput


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    extra: int | None = None


def test_read_by_name_position_key_and_unpacking() -> None:
    sample = torch.ones(2)
    output = Output(sample, 3)
    assert output.sample is output[0] is output["sample"]
    assert output[:] == (sample, 3)
    first, second = output
    assert (first, second) == (sample, 3)
    assert len(output) == 2


def test_absent_last_field_is_skipped_by_position() -> None:
    output = Output(torch.ones(2))
    assert len(output.to_tuple()) == 1
    assert output["extra"] is None
    with pytest.raises(IndexError):
        output[1]


def test_traces_without_a_graph_break() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        output = Output(sample=2 * x)
        return output.sample + output[0]

    x = torch.randn(3)
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), 4 * x)
