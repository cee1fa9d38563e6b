"""Tables that a module makes once for each device."""

import copy
import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperadapt.tables import Tables

CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_table_is_made_once_for_each_device_and_dtype() -> None:
    tables = Tables()
    first = tables.table([2, 0, 1], CPU)
    assert torch.equal(first, torch.tensor([2, 0, 1]))
    assert tables.table((2, 0, 1), CPU) is first
    assert tables.table([2, 0], CPU) is not first
    assert tables.table([2, 0, 1], META).device == META
    assert torch.equal(tables.table([2, 0, 1], CPU, torch.float32), torch.tensor([2.0, 0.0, 1.0]))
    assert tables.table([2, 0, 1], CPU) is first


def test_a_table_of_inference_mode_serves_training() -> None:
    tables, values = Tables(), torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        tables.table([2, 2], CPU)
    values[tables.table([2, 2], CPU)].sum().backward()
    assert torch.equal(values.grad, torch.tensor([[0.0], [0.0], [2.0]]).expand(3, 4))


def test_a_table_without_data_serves_nothing_else() -> None:
    tables = Tables()
    with FakeTensorMode():
        tables.table([1], CPU)
    assert tables.table([1], CPU).tolist() == [1]


def test_a_copy_makes_its_own() -> None:
    tables = Tables()
    table = tables.table([1], CPU)
    assert copy.deepcopy(tables).table([1], CPU) is not table


def test_a_graph_compiled_after_a_first_call_neither_makes_nor_copies_tables() -> None:
    torch.compiler.reset()
    tables, values, called = Tables(), torch.randn(4, 3), set()

    def forward(values: Tensor) -> Tensor:
        return values[tables.table([2, 0], CPU)] * tables.table((0.5, 2.0), CPU, torch.float32)[:, None]

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.update(node.target for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    expected = forward(values)
    assert torch.equal(torch.compile(forward, fullgraph=True, backend=note)(values), expected)
    assert called == {operator.getitem, operator.mul}
