"""Failing asserts of the shipped contract suite shall show their values, as those of the tests do."""

import pytest

pytest.register_assert_rewrite("snapchain.testing.object_contract")
