"""Fixtures for the tests of the single-file scripts."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# SCRIPTS_DIR lets the tests run on copies that were broken on purpose, to see that they notice.
SCRIPTS = Path(
    os.environ.get("SCRIPTS_DIR") or Path(__file__).resolve().parent.parent / "cleanrl_sparse"
)

# One thread per process: the processes of the tests fill the machine, and threads of such small
# networks would mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Under nohup, or in the background of a shell, the runs that tests start would ignore these too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# The games of most figures of the pruning paper.
FIFTEEN_GAMES = {
    *("MsPacman", "Pong", "Qbert", "Assault", "Asterix", "BeamRider", "Boxing", "Breakout"),
    *("CrazyClimber", "DemonAttack", "Enduro", "FishingDerby", "SpaceInvaders", "Tutankham"),
    "VideoPinball",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process have all tests of a script in a file: they share the runs of a session."""
    from xdist.scheduler import LoadScopeScheduling

    scripts = re.compile("|".join(path.stem for path in SCRIPTS.glob("*_*.py")))

    class ByScript(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return f"{file} {scripts.findall(test)[:1]}"

    return ByScript(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick and slow tests, and put the longest file first.

    Tests marked `shared` cover text that all scripts have in common: only eaudeqn_atari's are not
    slow.

    In test_runs.py these are slow too: all tests of dqn_atari_baselines, and those that train a
    script whose twin is tested anyway, except sac_mujoco_gmp. Tests that kill runs or damage files
    are the suite `kill`, except eaudeqn_minatar's, whose runs are small and stand for all.
    """
    items.sort(key=lambda item: item.path.name != "test_runs.py")
    alone = "test_one_file_alone_trains[eaudeqn_atari]"
    for item in items:
        if item.path.name in ("test_blocks.py", "test_sparsity.py") or item.name == alone:
            item.add_marker(pytest.mark.quick)
        runs = item.path.name == "test_runs.py"
        baselines = runs and "dqn_atari_baselines" in item.name
        twin = runs and any(
            f"{name}_gmp" in item.name
            for name in ("dqn_atari", "dqn_minatar", "sac_mujoco", "rainbow_resnet", "cql_atari")
        )
        names = {*getattr(item, "fixturenames", ())}
        costly = names & {"straight", "broken_off"} or re.search(
            "_gmp-3|alone|when_the_target", item.name
        )
        if (
            "cql_offline_snip-3" in item.name
            or "cql_atari_eaudeqn-3" in item.name
            or "cql_atari_gmp-3" in item.name
            or "minatar-3" in item.name
            or "minatar_gmp-3" in item.name
        ):
            item.add_marker(pytest.mark.skip(reason="it has one environment or none to train in"))
        shared = item.get_closest_marker("shared") and "eaudeqn_atari" not in item.name
        damage = names & {"killed", "mended"} or "survives_a_signal" in item.name
        kills = damage or "broken_off" in names or item.get_closest_marker("kill")
        twin = twin and "sac_mujoco_gmp-1" not in item.name
        if item.get_closest_marker("slow") or baselines or shared or (twin and costly):
            item.add_marker(pytest.mark.slow)
        elif kills and "eaudeqn_minatar" not in item.name:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.kill)


def load_script(name: str) -> ModuleType:
    """Import cleanrl_sparse/NAME.py, which is a script and no package's module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def script_fixture(name: str) -> Callable[[], ModuleType]:
    """Return a fixture, once per session, that is cleanrl_sparse/NAME.py as a module."""

    @pytest.fixture(scope="session")
    def module() -> ModuleType:
        return load_script(name)

    return module


eaudeqn = script_fixture("eaudeqn_atari")
dqn = script_fixture("dqn_atari_gmp")
rainbow = script_fixture("rainbow_resnet_gmp")
baselines = script_fixture("dqn_atari_baselines")
eaudesac = script_fixture("sac_mujoco_eaudeqn")
sac = script_fixture("sac_mujoco_gmp")
cql = script_fixture("cql_offline_snip")
cql_eaudeqn = script_fixture("cql_atari_eaudeqn")
cql_gmp = script_fixture("cql_atari_gmp")
