"""Who may import whom, read from the source: the house's floors and walls, held."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent / "aiouffd"

#: The house.  A module imports what stands above it, on its own floor or another.  What it needs
#: for annotations only (``if TYPE_CHECKING``) may also stand below it on the same floor.
FLOORS = {
    "facts": """
        errors kernel kernel.abi kernel.buffers kernel.calls kernel.ptrace kernel.registers
        kernel.injection kernel.tracing kernel.holding_gil kernel.history
        kernel.gates kernel.handshake kernel.pagemap kernel.maps kernel.page_cache
        kernel.capabilities kernel.probe kernel.parent""",
    "values": """
        fds ranges events resolutions failure address_space flow
        protocols protocols.pages migration migration.wire migration.stages migration.backlog
        protocols.criu protocols.criu.protobuf protocols.criu.images protocols.criu.page_wire
        protocols.criu.lazy_socket""",
    "asyncio": """
        eager threads readiness metrics uffd filled_pages journal
        flight performer region timers parking watchdog recovery resolver reader
        dispatcher settling detaching pager
        lazy_pages lazy_mapping lazy_answers lazy_flights lazy_faults lazy_pins
        lazy_serving frame_raise sigbus lazy_memory""",
    "pages": """
        sources sources.buffer sources.file sources.zero sources.measured
        sources.buffer_pool sources.seek_table sources.zstd_frames sources.compressed_layout
        sources.decompressing sources.reads sources.zstd_marks sources.compressed
        sources.cached sources.layered sources.fallback sources.urls sources.shared
        sources.http_answers sources.http_places sources.http sources.object_store
        sources.peer sources.redis_client sources.redis
        working_set recording prefetch_plan prefetch removals dirty
        handlers""",
    "processes": """
        sd_notify service_manager fd_store keeper
        unix_socket handover manifest protection graduation residency
        session_states session_figures service closing forked_children
        session sharing takeover totals reports
        source_opening together server
        protocols.firecracker protocols.shared
        certificates protocols.criu.tls
        protocols.criu.task_memory protocols.criu.task_source protocols.criu.checkpoint
        peers protocols.criu.page_server protocols.criu.page_client
        protocols.criu.image_folder protocols.criu.page_receiver export
        protocols.criu.restored_tasks protocols.criu.restore
        migration.lz4_blocks migration.packing migration.channel migration.line
        migration.figures migration.memory migration.outgoing
        migration.incoming migration.listener migration.program migration.moving
        migration.tls migration.report
        protocols.criu.parcel protocols.criu.command migration.tree_leaving
        migration.tree_pages migration.tree_arriving""",
    "tools": """
        . testing testing.sources
        testing.touches testing.latency
        testing.ahead testing.schedules testing.strategies testing.pasting
        testing.places
        testing.touch_log testing.record_file testing.record testing.perfetto
        testing.rules testing.settings testing.needs
        testing.engine testing.channel testing.where testing.pages testing.stepping
        testing.turning testing.announcements testing.whose testing.watching testing.holding
        testing.performing testing.asleep testing.participants testing.service
        testing.trampoline testing.failures testing.helper testing.mapping
        testing.running testing.threads testing.arming testing.freezing testing.waiting
        testing.region testing.ledger testing.recording testing.interleaving
        testing.preload testing.descendants testing.programs testing.harness
        cli.statuses cli.main cli cli.arguments
        cli.image_options cli.prefetch_options
        plotting testing.record_plot testing.per_test testing.pytest_plugin
        working_set_plot cli.picture cli.working_set
        image image.new_file image.sparse image.packed image.copying image.survey
        snapshot protected_memory live_snapshot
        page_map status prometheus http_site control
        migration.report_plot migration.prometheus
        cli.control_client cli.sessions cli.top cli.complete cli.snapshot cli.drain
        cli.output cli.orders cli.report_fields cli.diagnostics
        cli.metrics_site cli.operating cli.operation
        cli.restore_count cli.store_options cli.export cli.criu_options
        cli.progress cli.jobs cli.image
        protocols.criu.survey protocols.criu.plot protocols.criu.strip
        cli.criu cli.criu_show cli.criu_strip
        cli.criu_lazy_pages cli.criu_page_server
        cli.migrate cli.migrate_figures cli.migrate_options cli.migrate_progress
        cli.migrate_send cli.migrate_receive cli.migrate_restart cli.migrate_report
        cli.migrate_tree_options cli.migrate_send_tree cli.migrate_receive_tree
        cli.info cli.serve cli.keep cli.demo_target cli.demo __main__""",  # "." is aiouffd itself
}
ORDER = [module for names in FLOORS.values() for module in names.split()]
FLOOR_OF = {module: floor for floor, names in FLOORS.items() for module in names.split()}

#: All that pure logic takes from the standard library (mmap for the size of a page).
PURE = {
    *("__future__", "bisect", "collections", "dataclasses", "enum"),
    *("json", "mmap", "struct", "types", "typing", "warnings", "zlib"),
}
#: Optional packages, each with the few modules that may import it: one per job it is there for.
OPTIONAL: dict[str, set[str]] = {
    "aiohttp": {"http_site", "sources.http"},
    "obstore": {"sources.object_store"},
    "yarl": {"sources.http_places"},  # aiohttp's own URLs
    "matplotlib": {"plotting"},
    "prometheus_client": {"prometheus", "migration.prometheus"},
    "rich": {"cli.top"},
    "numpy": {"testing.region"},
    "lz4": {"migration.lz4_blocks"},
    "pytest": {"testing.sources", "testing.pytest_plugin"},
    "redis": {"sources.redis_client"},
    "backports": {"sources.zstd_frames"},  # from 3.14 compression.zstd
    "compression": {"sources.zstd_frames"},
}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "."


PATHS = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports, in full, and whether for annotations only."""
    package = ["aiouffd", *([] if module == "." else module.split("."))]
    if PATHS[module].name != "__init__.py":
        package.pop()
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    quiet = {
        inner for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in quiet) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node in quiet) for alias in node.names)


def _inside(imported: str) -> str:
    """Return our module that an imported name lives in: a name in a module, or the module."""
    name = imported.removeprefix("aiouffd").removeprefix(".") or "."
    return name if name in PATHS else name.rpartition(".")[0] or "."


@pytest.mark.parametrize("module", PATHS)
def test_imports_go_upwards(module: str) -> None:
    """A module imports only what stands above it, and optional packages only in their module."""
    assert module in ORDER, f"give aiouffd.{module} its place in FLOORS"
    for imported, annotations_only in _imports(module):
        top = imported.partition(".")[0]
        if top == "aiouffd":
            other = _inside(imported)
            neighbours = annotations_only and FLOOR_OF[other] == FLOOR_OF[module]
            # a folder's own door (kernel, cli) may be imported by what lies in the folder
            assert neighbours or ORDER.index(other) <= ORDER.index(module), (
                f"{module} imports {other}, which stands below it"
            )
        elif not annotations_only:
            assert top in sys.stdlib_module_names or module in OPTIONAL.get(top, ()), (
                f"{module} imports {top}: the core is standard library only"
            )
            if FLOOR_OF[module] == "values":
                assert top in PURE or (module, top) == ("fds", "os"), f"{module} imports {top}"
            if FLOOR_OF[module] == "facts":
                assert top != "asyncio", f"{module} knows of loops"


@pytest.mark.parametrize("module", [module for module in PATHS if not module.startswith("kernel")])
def test_only_the_kernel_floor_makes_calls(module: str) -> None:
    """No ioctl and no raw system call stands outside ``kernel/``."""
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        assert name not in {"ioctl", "syscall"}, f"{module}:{getattr(node, 'lineno', '?')}: {name}"
    for imported, _ in _imports(module):
        assert imported != "fcntl.ioctl", f"{module} imports ioctl"


def test_every_place_is_taken() -> None:
    """The order names no module that is gone."""
    assert not set(ORDER) - set(PATHS)
