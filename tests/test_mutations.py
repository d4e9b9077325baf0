"""The table of mutations names lines and tests that are there; `make mutate` shows that they notice the changes."""

from __future__ import annotations

import pytest

from tests.mutations import ROOT, Mutation, mutated, mutations


@pytest.mark.parametrize("mutation", mutations(), ids=str)
def test_each_line_stands_where_the_table_has_it(mutation: Mutation) -> None:
    assert mutated((ROOT / "snapchain" / mutation.file).read_text(), mutation)
    for test in mutation.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text()
        assert not name or f"def {name.partition('[')[0].rpartition('::')[2]}(" in text, test
