"""Print what a model answers: python tools/sample.py --model runs/sft/final "question"."""

import sys
from pathlib import Path

from transformers import GenerationConfig, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.tokenization as tok  # noqa: E402
from common.plumbing import flags, models  # noqa: E402
from common.verifier import check_gold, extract_answer, verify  # noqa: E402


def sample(model, tokenizer, question, args):
    """Pairs of a response's text and whether it ended within the budget."""
    set_seed(args.seed)
    stops = tok.stop_ids(tokenizer, model.config)
    # In place of the settings in the model's folder: no top-p and no penalties, as in the scripts.
    model.generation_config = GenerationConfig(
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.samples,
        eos_token_id=stops,
    )
    prompts = tok.encode_prompts(tokenizer, [question], args.prompt_template)
    tokens, mask = tok.pad(prompts, device=model.device)
    rows = model.generate(tokens, attention_mask=mask)[:, tokens.shape[1] :].tolist()
    rows = [tok.truncate(ids, stops, args.max_new_tokens) for ids in rows]
    return list(zip(tok.decode_responses(tokenizer, rows), [ids[-1] in stops for ids in rows]))


def main(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("question", nargs="?", help="if absent, each line typed is a question")
    add("--answer", help="the correct answer; adds the verifier's verdict")
    add("--model", default="tiny/model", help="hub name or folder")
    add("--prompt-template", default="{question}", help="as in training")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=flags.number(), default=1.0, help="divides the logits; 0: greedy")
    add("--max-new-tokens", type=flags.integer(1), default=256, help="budget of a response")
    add("--samples", type=flags.integer(1), default=1, help="responses to each question")
    add("--seed", type=flags.integer(0, 2**32 - 1), default=0, help="of each question")
    args = parser.parse_args(argv)
    readable = args.answer is None or check_gold(args.answer)
    sentence = "the verifier cannot read it; give a number or an expression."
    flags.demand(readable, f"--answer {args.answer}: {sentence}")
    sentence = "greedy responses are all the same; set --temperature above 0."
    flags.demand(args.samples == 1 or args.temperature, f"--samples {args.samples}: {sentence}")
    model, tokenizer = models.load_model(args.model)
    questions = [args.question] if args.question else filter(str.strip, sys.stdin)
    for question in questions:
        for text, ended in sample(model, tokenizer, question.strip(), args):
            print(text if ended else f"{text} [truncated: raise --max-new-tokens]")
            if args.answer is not None:
                verdict = "correct" if verify(text, args.answer) else "incorrect"
                print("no answer found" if extract_answer(text) is None else verdict)


if __name__ == "__main__":
    main()
