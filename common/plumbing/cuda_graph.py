"""CUDA graphs: a step of decoding, recorded once for each shape and then replayed."""

import torch
from transformers.cache_utils import DynamicLayer


def obstacles(model, cache):
    """What forbids buffers of fixed size, and what forbids recording; "" where nothing does."""
    config = model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", ""))
    why = ""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        why = "the model has sliding windows"
    elif getattr(config, "num_kv_shared_layers", 0):
        why = "layers of the model share keys and values"
    elif "dynamic" in rope or "longrope" in rope:
        return "", "the model's RoPE depends on the longest position"
    return why, why


class Replay:
    """A step that runs again and again; where `records`, it is recorded once per shape and then replayed."""

    said = set()  # why something was not recorded; each reason is given once

    def __init__(self, step, generator, records, unless):
        self.step, self.generator = step, generator
        self.records = records and not unless
        if records and unless and unless not in self.said:
            self.said.add(unless)
            print(f"sampling runs step by step, without a CUDA graph: {unless}")
        self.forget()

    def forget(self):
        """Tensors have moved. A graph's memory is freed with it: only one is alive at a time."""
        self.replay, self.warm = None, False

    def __call__(self):
        if self.records and self.warm:
            self.replay = self.replay or record(self.step, self.generator)
            self.replay()
        else:
            self.step()  # the first of a shape counts, and lets libraries allocate what they need
        self.warm = True


def record(step, generator):
    """A function that repeats the kernels of `step` on the same addresses; nothing is computed here."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)  # each replay draws new numbers
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
        step()
    return graph.replay
