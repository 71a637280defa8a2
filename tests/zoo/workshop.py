"""Copies of the repository with a changed line, and test runs in these copies, each in a fork."""

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
# these take half of the time of a short run
QUICK = ["--assert=plain", "-p", "no:unraisableexception", "-p", "no:cacheprovider"]
LINKED = ("tiny", "experiments", "docs", "README.md", "pyproject.toml")  # tests only read these


def patched(bug):
    """(path, text) of the file with the bug. A fragment that is not on exactly one line is stale."""
    lines = (ROOT / bug["file"]).read_text().split("\n")
    at = [i for i, line in enumerate(lines) if bug["old"] in line]
    if len(at) != 1 or lines[at[0]].count(bug["old"]) != 1:
        raise ValueError(f"stale: {bug['old']!r} is on {len(at)} lines of {bug['file']}, not on 1")
    lines[at[0]] = lines[at[0]].replace(bug["old"], bug["new"])
    return bug["file"], "\n".join(lines)


def workspace(folder, changed=()):
    """A copy of the scripts, common/ and tests/ in which the files of `changed` have other texts.

    `changed` is a list of (path, text).
    """
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
    """Run {name: (folder, node ids)}; return {name: (exit status, [(node, phase, outcome, exception)])}.

    One process imports the libraries and forks for each job, two at a time, so that no run has
    to import them again.
    """
    with tempfile.TemporaryDirectory(prefix="zoo-") as out:
        orders = {name: (str(folder), list(nodes)) for name, (folder, nodes) in jobs.items()}
        Path(out, "jobs.json").write_text(json.dumps(orders))
        server = subprocess.run([sys.executable, __file__, out], capture_output=True, text=True, check=False)
        if server.returncode:
            raise RuntimeError(server.stderr)
        return {name: json.loads(Path(out, f"{i}.json").read_text()) for i, name in enumerate(jobs)}


class Watch:
    """A pytest plugin: (node, phase, outcome, exception) of each test and of failures in its setup."""

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
    """In the forked process: run pytest in the copy without output and write the result to a file."""
    os.chdir(folder)
    sys.path[0] = folder  # instead of the folder of this file
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
    # imported once, before the forks
    import datasets, hypothesis, sympy, torch, transformers  # noqa: E401, F401, I001
    import transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama  # noqa: E401, F401

    torch.set_num_threads(1)  # a thread pool would not survive the fork
    gc.freeze()
    running = set()
    for i, (folder, nodes) in enumerate(json.loads((out / "jobs.json").read_text()).values()):
        if len(running) == 2:
            running.discard(os.wait()[0])
        if not (pid := os.fork()):
            try:
                child(folder, nodes, str(out / f"{i}.json"))
            finally:  # in any case: the loop below belongs to the parent
                os._exit(0)
        running.add(pid)
    while running:
        running.discard(os.wait()[0])


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
