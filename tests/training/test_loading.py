"""The first weights of a phase on two real processes: exact at every stage, and never whole in a rank's memory."""

import json
from pathlib import Path

import pytest

from support import loading_cases
from support.launch import launch
from vae_ds.bench.ranks import RETURN_FREED_MEMORY

PROCESSES = 2


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("loading")
    loading_cases.make_bases(folder)
    script = Path(loading_cases.__file__)
    # The holes in the heap would count as memory in use.
    finished = launch(
        [script, folder, folder], processes=PROCESSES, timeout_s=560, env=RETURN_FREED_MEMORY, check=False
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
