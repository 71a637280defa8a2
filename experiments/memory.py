"""Memory per GPU of training and of sampling, computed from a model's shape, for the tables on the pages.

    python experiments/memory.py --tokens 8192           # --micro-batch-tokens of the run; bf16 autocast
    python experiments/memory.py --rows 512 --length 1024    # --sample-rows; tokens of prompt and response

Nothing is measured here. With P parameters, n GPUs, T tokens in a micro-batch, L layers, width D, MLP width
F, vocabulary V, q query and k key-value heads of width h, and b bytes per activation (2 under --dtype bf16,
else 4). P' are the layers' matrices, B their biases, N all norms. W are the parameters of one layer, R those
of no layer: embedding, last norm, and the head unless it is the embedding.

    weights    4 P / n          fp32; --kl-coef above 0 loads a second, frozen set
    gradients  4 P / n          fp32, summed over ranks after each micro-batch
    Adam       8 P / n          two fp32 moments
    gathered   8 R + 16 W       n > 1: R and its gradient are whole; and of layers the one that computes,
                                the next one, a gradient, and a gradient on its way
    copies     2 P'             autocast's bf16 copies of the layers' matrices, until the backward pass;
                                2 P' / L where n > 1 and layers are recomputed
    a layer    T (16 D          inputs of two norms, and what they have normalised, fp32
                + 10 D or 8 D   inputs of q, k, v, gate, up: five bf16 copies, or two shared fp32 tensors
                + 4 F b         gate, SiLU(gate), up, their product
                + 2 b h (q + k) q, k, v and the attention's output
                + 8 + 4 q)      scalars of the norms, log-sum-exp of the attention
    head       16 T D           final norm, hidden states and their gradient; logits [T, V] never exist

--gradient-checkpointing keeps only the fp32 input of each layer, 4 T D, and one layer at a time in full. Not
counted: CUDA's context, work spaces and fragments (allow 2 GiB); temporaries of Adam, about 4 P / n, when
activations are gone.

Sampling comes when gradients and activations are gone. R rows, none of which has ended and each of which is
padded to the longest, take beside weights and Adam's moments

    copy       2 (P' + B + V D) bf16: the linear layers and the head; n = 1: it stays while training
               + 4 (N + V D)    n > 1: fp32, what one GPU would share with the model; it goes before training
    KV cache   2 L k h b        per row and token
    logits     16 R V           fp32: the logits, probabilities, and what the draw needs

In fp32 the copy is the model for n = 1, and 4 (P + V D or 0) for n > 1.

The last table is that of rlhf_ppo.py: policy and critic are trained, with activations of both at once, the
reference and the reward model are frozen and have weights only. Critic and reward model have S parameters,
an output of width 1 instead of V: S = P + D + 1 - V D, or P + D + 1 where the output is the embedding.
"""

import argparse

GIB = 2**30
SHAPES = {  # of the models' config.json: L, D, F, V, q, k, h, is the head the embedding?
    "Qwen2.5-0.5B": (24, 896, 4864, 151936, 14, 2, 64, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 151936, 12, 2, 128, True),
    "Qwen2.5-7B": (28, 3584, 18944, 152064, 28, 4, 128, False),
    "Qwen2.5-32B": (64, 5120, 27648, 152064, 40, 8, 128, False),
}
GPUS = (1, 4, 8, 16)
CARDS = {40: 39, 80: 78, 141: 139}  # GB by name: GiB that a process can have
SPARE = 2  # GiB: CUDA's context, work spaces, fragments
LEAST_ROWS = 16  # fewer at once are no sampling


def matrices(shape):
    """P'."""
    layers, d, f, _, q, k, h, _ = shape
    return layers * (2 * d * h * (q + k) + 3 * d * f)  # q and output, k and v; gate, up and down


def biases(shape):
    """B."""
    layers, *_, q, k, h, _ = shape
    return layers * h * (q + 2 * k)


def parameters(shape):
    """P and P'."""
    layers, d, _, v, *_, tied = shape
    norms = (2 * layers + 1) * d
    return matrices(shape) + biases(shape) + norms + v * d * (1 if tied else 2), matrices(shape)


def one_layer(shape):
    """W."""
    layers, d, *_ = shape
    return (matrices(shape) + biases(shape)) // layers + 2 * d


def layer(shape, b):
    """Bytes that one layer keeps per token for its backward pass."""
    _, d, f, _, q, k, h, _ = shape
    return 16 * d + (10 if b == 2 else 8) * d + 4 * f * b + 2 * b * h * (q + k) + 8 + 4 * q


def activations(shape, recompute, b=2):
    """Bytes per token of a micro-batch."""
    layers, d, *_ = shape
    kept = layers * 4 * d + layer(shape, b) if recompute else layers * layer(shape, b)
    return kept + 16 * d


def gathered(shape, ranks):
    """Bytes of weights and gradients that are whole for a while."""
    if ranks == 1:
        return 0
    layers, w = shape[0], one_layer(shape)
    return 8 * (parameters(shape)[0] - layers * w) + 16 * w


def copies(shape, recompute, ranks, b=2):
    """Bytes of autocast's copies."""
    if b == 4:
        return 0
    kept = 1 if recompute and ranks > 1 else shape[0]
    return 2 * matrices(shape) // shape[0] * kept


def copied(shape, ranks, b=2):
    """Bytes of the copy that samples."""
    p, matrix = parameters(shape)
    embedding = shape[3] * shape[1]
    if b == 4:
        return 0 if ranks == 1 else 4 * (p + (embedding if shape[-1] else 0))
    linear = matrix + biases(shape) + embedding
    rest = p - matrix - biases(shape) - (0 if shape[-1] else embedding)  # norms and embedding
    return 2 * linear + (0 if ranks == 1 else 4 * rest)


def total(shape, tokens, recompute, ranks, b=2):
    """Bytes on one GPU while it trains."""
    p = parameters(shape)[0]
    whole = gathered(shape, ranks) + copies(shape, recompute, ranks, b)
    whole += copied(shape, ranks, b) if ranks == 1 else 0
    return 16 * p / ranks + whole + tokens * activations(shape, recompute, b)


def cached(shape, b=2):
    """Bytes per row and token of the KV cache."""
    layers, *_, k, h, _ = shape
    return 2 * layers * k * h * b


def sampling(shape, rows, length, ranks, b=2):
    """Bytes on one GPU while it samples, no row having ended yet."""
    p, vocabulary = parameters(shape)[0], shape[3]
    return 12 * p / ranks + copied(shape, ranks, b) + rows * (length * cached(shape, b) + 16 * vocabulary)


def scorer(shape):
    """S."""
    _, d, _, v, *_, tied = shape
    return parameters(shape)[0] + d + 1 - (0 if tied else v * d)


def four(shape, tokens, recompute, ranks, b=2):
    """Bytes on one GPU under rlhf_ppo.py: policy, critic, reference, reward model."""
    p, s = parameters(shape)[0], scorer(shape)
    policy = total(shape, tokens, recompute, ranks, b)
    critic = policy - 16 * (p - s) / ranks - (copied(shape, ranks, b) if ranks == 1 else 8 * (p - s))
    return policy + critic + 4 * (p + s) / ranks


def sampling_beside(shape, rows, length, ranks, b=2):
    """Bytes on one GPU under rlhf_ppo.py while it samples."""
    p, s = parameters(shape)[0], scorer(shape)
    return sampling(shape, rows, length, ranks, b) + (12 * s + 4 * p + 4 * s) / ranks


def smallest_card(training, held, row, most):
    """GB of the smallest card for so many bytes of training, and the rows that it samples beside `held`."""
    for gb, gib in CARDS.items():
        room = (gib - SPARE) * GIB
        rows = min(most, int((room - held) / row))
        if training <= room and rows >= LEAST_ROWS:
            return f"{gb}, {rows} rows"
    return "none"


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names):
    return row(*names) + "\n" + "| --- " * len(names) + "|"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="--micro-batch-tokens")
    parser.add_argument("--rows", type=int, default=512, help="--sample-rows")
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and response")
    args = parser.parse_args()
    tokens, rows, length = args.tokens, args.rows, args.length

    names = "weights, gradients, Adam | gathered, n > 1 | copies | activations | … recomputed".split(" | ")
    sampled = ["copy, n = 1", "copy, n > 1", "KV cache", "logits"]
    print(head("GiB, computed: parts", *names, *sampled))
    for name, shape in SHAPES.items():
        p, matrix = parameters(shape)
        training = (16 * p, gathered(shape, 2), 2 * matrix)
        kept = [tokens * activations(shape, recompute) for recompute in (False, True)]
        sample = (copied(shape, 1), copied(shape, 2), rows * length * cached(shape), 16 * rows * shape[3])
        cells = map(gib, (*training, *kept, *sample))
        print(row(f"{name}, {p / 1e9:.2f} G", *cells))

    columns = [f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS]
    print("\n" + head("GiB per GPU, computed: training / recomputed / sampling → card, GB", *columns))
    for name, shape in SHAPES.items():
        cells = []
        for n in GPUS:
            training = [total(shape, tokens, recompute, n) for recompute in (False, True)]
            held, full = (sampling(shape, size, length, n) for size in (0, rows))
            card = smallest_card(training[1], held, (full - held) / rows, rows)
            cells.append(f"{' / '.join(map(gib, (*training, full)))} → {card}")
        print(row(name, *cells))

    print("\n" + head("GiB per GPU, computed, `rlhf_ppo.py`: training / recomputed → card, GB", *columns))
    for name, shape in SHAPES.items():
        cells = []
        for n in GPUS:
            training = [four(shape, tokens, recompute, n) for recompute in (False, True)]
            held, full = (sampling_beside(shape, size, length, n) for size in (0, rows))
            card = smallest_card(training[1], held, (full - held) / rows, rows)
            cells.append(f"{' / '.join(map(gib, training))} → {card}")
        print(row(name, *cells))


def gib(x):
    return f"{x / GIB:.1f}"


if __name__ == "__main__":
    main()
