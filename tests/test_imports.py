"""No module of the three packages imports itself in a circle, not even for the sake of types."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("cluster", "ocvtp", "pipelines")


@pytest.mark.parametrize("package", ["cluster", "ocvtp", "pipelines"])
def test_there_is_no_circle_of_imports(graph: grimp.ImportGraph, package: str) -> None:
    modules = {package, *graph.find_descendants(package)}
    # What a package's __init__ hands on for type checkers and on demand is no part of a circle: it imports nothing.
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules - {package}}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")
