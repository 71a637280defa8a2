"""What the tests share: offline, single-threaded settings, a part of the tiny world, three small models."""

import os
import shutil
import tempfile
from contextlib import contextmanager

CACHE = tempfile.mkdtemp(prefix="datasets-")  # tests leave nothing in the user's cache
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": CACHE}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: E402

import grpo  # noqa: E402
import luffy  # noqa: E402
import prefix_rft  # noqa: E402
import sft  # noqa: E402
from common.plumbing import models  # noqa: E402
from common.plumbing import runs as plumbing_runs  # noqa: E402

torch.set_num_threads(1)  # one order of summation: bits can be compared
ROOT = Path(__file__).parent.parent
SCRIPTS = {"sft": sft, "grpo": grpo, "prefix_rft": prefix_rft, "luffy": luffy}
QUICK = ["--eval-questions", 1, "--eval-samples", 0, "--save-every", 0]


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def finite(line):
    """Whether a line of metrics.jsonl has no null, as NaN and infinity are written, and no skipped update."""
    return None not in line.values() and line.get("skipped", 0) == 0


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Forty training and twelve held-out rows of the tiny world's easiest levels, in its folder layout."""
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 40), ("test", 12)):
        easy = [row for row in read_jsonl(ROOT / f"tiny/data/{split}.jsonl") if row["level"] in ("1", "2")]
        write_jsonl(folder / f"{split}.jsonl", easy[:n])
    return str(folder)


@pytest.fixture(scope="session")
def small(data):
    """small(name, out, *more): the arguments of a run that takes seconds; later ones win."""

    def flags(name, out, *more):
        base = f"--output-dir {out} --data {data} --model {ROOT}/tiny/model --steps 4 --save-every 2"
        base += " --batch-size 4 --max-new-tokens 48 --eval-questions 6 --eval-samples 2 --warmup-steps 0"
        base += " --lr 5e-4" + (" --group-size 4" if name in ("grpo", "prefix_rft", "luffy") else "")
        return [*base.split(), *map(str, more)]

    return flags


@pytest.fixture(scope="session")
def run(small):
    """run(name, out, *more): main() of a script in this process; the folder of the run."""

    def go(name, out, *more):
        SCRIPTS[name].main(SCRIPTS[name].parse_args(small(name, out, *more)))
        return Path(out)

    return go


@pytest.fixture(scope="session")
def spawn(small):
    """spawn(name, out, *more): the script as a user runs it, in its own process."""

    def go(name, out, *more):
        command = [sys.executable, f"{name}.py", *small(name, out, *more)]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return go


@pytest.fixture(scope="session")
def runs(spawn, tmp_path_factory):
    """One finished run of each script, as a user starts it: {name: (folder, stdout)}."""
    done = {}
    for name in SCRIPTS:
        out = tmp_path_factory.mktemp("runs") / name
        process = spawn(name, out)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        done[name] = out, stdout
    return done


@pytest.fixture(scope="session")
def tiny():
    """The embedded model (Llama: relative positions) and its tokenizer (pad is not EOS)."""
    folder = ROOT / "tiny/model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def gpt2(vocabulary, **more):
    """A random GPT-2: absolute positions, so that a row shifted by its padding gives other numbers."""
    torch.manual_seed(0)
    size = dict(n_positions=512, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=None)
    config = GPT2Config(vocab_size=vocabulary, **size | more)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def pad_is_eos(tmp_path_factory):
    """A folder with a GPT-2 whose pad token is its EOS and that has no chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    eos = tokenizer.eos_token_id
    gpt2(len(tokenizer), eos_token_id=eos, pad_token_id=eos).save_pretrained(folder)
    return folder


def compiled(kernel, types, constants, aligned, cc, launch):
    """A Triton kernel compiled for a GPU that need not be there, and what ptxas says: spills are refused."""
    triton = pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be compiled")
    from triton.backends.compiler import GPUTarget

    place = {name: i for i, name in enumerate(kernel.arg_names)}
    signature = {name: "constexpr" if name in constants else types[name] for name in place}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(place[name],): value for name, value in constants.items()},
        {(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=launch)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        arch = f"sm_{cc}a" if cc == 90 else f"sm_{cc}"
        command = [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, (kernel, report)
    assert binary.metadata.shared <= {80: 163, 86: 99, 90: 227}[cc] * 1024, kernel
    return binary


def are_greedy(responses, model, prompts, budget):
    """Whether these are what generate() gives, prompt by prompt."""
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=budget
        )
        if response != whole[0, len(prompt) :].tolist():
            return False
    return True


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision: rounding errors are near 1e-12, and Adam cannot amplify them."""
    load, scorer = models.load_model, models.load_scorer

    def double(*args):
        model, tokenizer = load(*args)
        return model.double(), tokenizer

    monkeypatch.setattr(models, "load_model", double)
    monkeypatch.setattr(models, "load_scorer", lambda *a, **k: scorer(*a, **k).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def killed_after(step):
    """The run ends as soon as the line of this step has been logged."""
    log = plumbing_runs.log

    def stop(folder, metrics, *samples):
        log(folder, metrics, *samples)
        if metrics["step"] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(plumbing_runs, "log", stop)
        yield


class Killed(Exception):
    pass


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(a, b, tolerance=0.0):
    """Every weight of two model folders is equal, bit for bit or within a tolerance."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_metrics(a, b, but=()):
    """Two metrics.jsonl files agree in every number, except times and memory."""
    ignored = {"seconds_sample", "seconds_train", "peak_memory", *but}
    kept = []
    for folder in (a, b):
        lines = read_jsonl(folder / "metrics.jsonl")
        kept.append([{k: v for k, v in line.items() if k not in ignored} for line in lines])
    assert kept[0] == kept[1]
