"""The first weights of a phase on two real processes: exact at every stage, and never whole in a rank's memory."""

import json
from pathlib import Path

import pytest

from support import loading_cases
from support.launch import launch

PROCESSES = 2
# Each tensor is mapped and unmapped by itself. Otherwise the holes in the heap would count as memory in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("loading")
    loading_cases.make_bases(folder)
    finished = launch(
        [Path(loading_cases.__file__), folder, folder], processes=PROCESSES, timeout_s=560, env=ALLOCATOR, check=False
    )
    print(finished.output)
    paths = [folder / f"rank{rank}.json" for rank in range(PROCESSES)]
    found = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    return [{"report": finished.report()} | one for one in found]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", loading_cases.cases(Path()))
def test_case_on_two_ranks(answers: list[dict[str, str]], case: str) -> None:
    for one in answers:
        assert one.get(case) == "ok", one.get(case, f"not reached\n{one['report']}")
