"""Annotator: a person ranks completions at the terminal. The simulated one is in rlhf_ppo.py."""


def ask(choices):
    """A person ranks completions of one question, best first: `2` of two, `2 3 1` of three."""
    if len(choices) < 2:
        return []
    print("", choices[0]["question"], sep="\n")
    for i, completion in enumerate(choices, 1):
        print(f"  {i}  {completion['text']}")
    while True:
        try:
            words = input("best first, or skip, or quit: ").split()
        except EOFError:  # Ctrl-D, or the end of a file
            words = ["quit"]
        if words == ["skip"]:
            return []
        if words == ["quit"]:
            print("all rankings are saved; the same command with --resume continues here")
            raise SystemExit
        order = [int(word) - 1 for word in words if word.isdecimal()]
        if len(order) == len(words) == len(choices) - 1:  # the last one need not be typed
            order += set(range(len(choices))) - set(order)
        if len(order) >= len(words) and sorted(order) == list(range(len(choices))):
            return [choices[i] for i in order]
