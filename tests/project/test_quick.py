"""Quick tests are a selection from everything."""

from __future__ import annotations

import pytest


def test_every_file_has_quick_tests(request: pytest.FixtureRequest) -> None:
    config = request.config
    if config.option.keyword or any("::" in argument for argument in config.args):
        pytest.skip("single tests are named")
    usual = [item for item in request.session.items if not item.get_closest_marker("slow")]
    quick = {item.path for item in usual if item.get_closest_marker("quick")}
    assert {item.path for item in usual} - quick == set()
