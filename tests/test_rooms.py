"""The order of modules: no two import each other, not even by way of others or inside functions."""

import grimp


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = grimp.build_graph("flows", "data_scoring", "trainer", "kernels", exclude_type_checking_imports=True)
    waiting = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    # Modules that import none that waits are taken away until none is left, or only circles and what imports them.
    while free := {module for module, imported in waiting.items() if not imported & waiting.keys()}:
        for module in free:
            del waiting[module]
    assert set(waiting) == set()
