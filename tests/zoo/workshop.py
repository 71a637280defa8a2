"""Copies of the repository with other lines in them; its tests run in such a copy for the price of forks."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUGS = tomllib.loads((Path(__file__).parent / "bugs.toml").read_text())
QUICK = ["--assert=plain", "-p", "no:unraisableexception", "-p", "no:cacheprovider"]  # half of a short run
LINKED = ("tiny", "experiments", "docs", "README.md", "pyproject.toml")  # only read by tests


def patched(bug):
    """(path, text) of the file with the bug in it; a fragment that is not on exactly one line is stale."""
    lines = (ROOT / bug["file"]).read_text().split("\n")
    at = [i for i, line in enumerate(lines) if bug["old"] in line]
    if len(at) != 1 or lines[at[0]].count(bug["old"]) != 1:
        raise ValueError(f"stale: {bug['old']!r} is on {len(at)} lines of {bug['file']}, not on one")
    lines[at[0]] = lines[at[0]].replace(bug["old"], bug["new"])
    return bug["file"], "\n".join(lines)


def workspace(folder, changed=()):
    """A copy of the scripts, common/ and tests/, with the texts of `changed` [(path, text), ...] in it."""
    folder = Path(folder)
    for part in ("common", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "zoo"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for part in LINKED:
        if (ROOT / part).exists():
            (folder / part).symlink_to(ROOT / part)
    for path, text in changed:
        (folder / path).write_text(text)
    return folder


def run(jobs):
    """Runs {name: (folder, node ids)} and returns {name: (exit status, [(node, phase, outcome, exception)])}.

    One process imports the libraries and forks for each job, two at a time: a run costs its tests, no start.
    """
    with tempfile.TemporaryDirectory(prefix="zoo-") as out:
        orders = {name: (str(folder), list(nodes)) for name, (folder, nodes) in jobs.items()}
        Path(out, "jobs.json").write_text(json.dumps(orders))
        server = subprocess.run([sys.executable, __file__, out], capture_output=True, text=True, check=False)
        if server.returncode:
            raise RuntimeError(server.stderr)
        return {name: json.loads(Path(out, f"{i}.json").read_text()) for i, name in enumerate(jobs)}


class Watch:
    """A pytest plugin: (node, phase, outcome, exception) of all that ran, and of what failed around it."""

    def __init__(self):
        self.seen = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed:
            exception = call.excinfo and call.excinfo.typename
            self.seen.append((report.nodeid, report.when, report.outcome, exception))
        return report


def child(folder, nodes, result):
    """In the forked process: pytest in the copy, silently; its verdict goes into a file."""
    os.chdir(folder)
    sys.path[0] = folder  # not the folder of this file
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    watch = Watch()
    code = pytest.main([*nodes, *QUICK], plugins=[watch])
    Path(result).write_text(json.dumps([int(code), watch.seen]))


def serve(out):
    """The process that `run` starts."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_DATASETS_CACHE": str(out / "cache"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = True
    import datasets, hypothesis, sympy, torch, transformers  # noqa: E401, F401, I001  before the forks: once
    import transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama  # noqa: E401, F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    gc.freeze()
    running = set()
    for i, (folder, nodes) in enumerate(json.loads((out / "jobs.json").read_text()).values()):
        if len(running) == 2:
            running.discard(os.wait()[0])
        if not (pid := os.fork()):
            try:
                child(folder, nodes, str(out / f"{i}.json"))
            finally:  # whatever happened: the loop is the parent's
                os._exit(0)
        running.add(pid)
    while running:
        running.discard(os.wait()[0])


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
