"""Memory per GPU of training and of sampling, computed from a model's shape, for the tables in docs/gpu.md.

    python experiments/memory.py --tokens 8192           # --micro-batch-tokens of the run; bf16 autocast
    python experiments/memory.py --rows 512 --length 1024    # --sample-rows; tokens of prompt and response

Nothing is measured here. With P parameters, n ranks, T tokens in a micro-batch, L layers, width D, MLP width
F, q query and k key-value heads of width h, and b bytes per activation (2 under --dtype bf16, else 4):

    weights    4 P              fp32, on every rank; --kl-coef above 0 loads a second, frozen set
    gradients  4 P              fp32, on every rank, summed over ranks once per optimizer step
    Adam       8 P / n          two fp32 moments; under torchrun a rank has those of its share (ZeRO 1)
    copies     2 P'             autocast's bf16 copies of the layers' matrices P', until the backward pass
    a layer    T (16 D          inputs of two norms, and what they have normalised, fp32
                + 10 D or 8 D   inputs of q, k, v, gate, up: five bf16 copies, or two shared fp32 tensors
                + 4 F b         gate, SiLU(gate), up, their product
                + 2 b h (q + k) q, k, v and the attention's output
                + 8 + 4 q)      scalars of the norms, log-sum-exp of the attention
    head       16 T D           final norm, hidden states and their gradient; logits [T, V] never exist

--gradient-checkpointing keeps only the fp32 input of each layer, 4 T D, and one layer at a time in full. Not
counted: CUDA's context, work spaces and fragments (allow 2 GiB); temporaries of Adam, about 4 P / n, when
activations are gone.

The second table is of sampling, when gradients and activations are gone. R rows, none of which has ended and
each of which is padded to the longest, take beside weights, Adam's moments and copies

    KV cache   2 L k h b        per row and token
    logits     16 R V           fp32: the logits, log-probabilities, probabilities, and what the draw needs

The third table is that of rlhf_ppo.py: policy and critic are trained, with activations of both at once, the
reference and the reward model are frozen and have weights only. Critic and reward model have S parameters,
an output of width 1 instead of V: S = P + D + 1 - V D, or P + D + 1 where the output is the embedding.
"""

import argparse

GIB = 2**30
SHAPES = {  # of the models' config.json: L, D, F, V, q, k, h, is the head the embedding?
    "Qwen2.5-0.5B": (24, 896, 4864, 151936, 14, 2, 64, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 151936, 12, 2, 128, True),
    "Qwen2.5-7B": (28, 3584, 18944, 152064, 28, 4, 128, False),
}


def parameters(shape):
    """P and P'."""
    layers, d, f, v, q, k, h, tied = shape
    matrices = layers * (2 * d * h * (q + k) + 3 * d * f)  # q and output, k and v; gate, up and down
    vectors = layers * (h * (q + 2 * k) + 2 * d) + d  # biases of q, k, v; norms
    return matrices + vectors + v * d * (1 if tied else 2), matrices


def layer(shape, b):
    """Bytes that one layer keeps per token for its backward pass."""
    _, d, f, _, q, k, h, _ = shape
    return 16 * d + (10 if b == 2 else 8) * d + 4 * f * b + 2 * b * h * (q + k) + 8 + 4 * q


def total(shape, tokens, recompute, ranks, b=2):
    """Bytes on one GPU."""
    (p, matrices), layers, d = parameters(shape), shape[0], shape[1]
    activations = layers * 4 * d + layer(shape, b) if recompute else layers * layer(shape, b)
    copies = 2 * matrices if b == 2 else 0
    return 8 * p + 8 * p / ranks + copies + tokens * (activations + 16 * d)


def cached(shape, b=2):
    """Bytes per row and token of the KV cache."""
    layers, *_, k, h, _ = shape
    return 2 * layers * k * h * b


def sampling(shape, rows, length, ranks, b=2):
    """Bytes on one GPU, no row having ended yet."""
    (p, matrices), vocabulary = parameters(shape), shape[3]
    copies = 2 * matrices if b == 2 else 0
    return 4 * p + 8 * p / ranks + copies + rows * (length * cached(shape, b) + 16 * vocabulary)


def scorer(shape):
    """S."""
    _, d, _, v, *_, tied = shape
    return parameters(shape)[0] + d + 1 - (0 if tied else v * d)


def four(shape, tokens, recompute, ranks, b=2):
    """Bytes on one GPU under rlhf_ppo.py: policy, critic, reference, reward model."""
    p, s = parameters(shape)[0], scorer(shape)
    policy, critic = total(shape, tokens, recompute, ranks, b), total(shape, tokens, recompute, ranks, b)
    return policy + critic - 8 * (p - s) - 8 * (p - s) / ranks + 4 * p + 4 * s


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="--micro-batch-tokens")
    parser.add_argument("--rows", type=int, default=512, help="--sample-rows")
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and response")
    args = parser.parse_args()
    tokens, rows, length = args.tokens, args.rows, args.length
    columns = "weights | gradients | Adam, 1 / 8 / 16 GPUs | bf16 copies | activations | … recomputed"
    ways = ((False, 1), (True, 1), (True, 8), (True, 16))  # recomputed? GPUs
    ends = "1 GPU | 1, recomputed | 8, recomputed | 16, recomputed |"
    print(f"| GiB per GPU, computed | {columns} | all: {ends}\n" + "| --- " * 11 + "|")
    for name, shape in SHAPES.items():
        p, matrices = parameters(shape)
        adam = " / ".join(gib(8 * p / n) for n in (1, 8, 16))
        parts = [total(shape, tokens, r, 1) - total(shape, 0, r, 1) for r in (False, True)]
        whole = [total(shape, tokens, *way) for way in ways]
        cells = [gib(x) for x in (4 * p, 4 * p, 2 * matrices, *parts, *whole)]
        print(f"| {name}, {p / 1e9:.2f} G | " + " | ".join([*cells[:2], adam, *cells[2:]]) + " |")
    print(f"\n| GiB per GPU, computed, sampling {rows} rows of {length:,} tokens | ", end="")
    print("KV cache, KiB a token | KV cache | logits | all: 1 GPU | 8 | 16 |\n" + "| --- " * 7 + "|")
    for name, shape in SHAPES.items():
        whole = [sampling(shape, rows, length, n) for n in (1, 8, 16)]
        cells = map(gib, (rows * length * cached(shape), 16 * rows * shape[3], *whole))
        print(f"| {name} | {cached(shape) / 1024:.0f} | " + " | ".join(cells) + " |")
    columns = "policy | critic | reference | reward model"
    print(f"\n| GiB per GPU, computed, `rlhf_ppo.py` | {columns} | all: {ends}\n" + "| --- " * 9 + "|")
    for name, shape in SHAPES.items():
        p, s = parameters(shape)[0], scorer(shape)
        cells = [16 * p, 16 * s, 4 * p, 4 * s, *(four(shape, tokens, *way) for way in ways)]
        print(f"| {name} | " + " | ".join(map(gib, cells)) + " |")


def gib(x):
    return f"{x / GIB:.1f}"


if __name__ == "__main__":
    main()
