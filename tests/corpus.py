"""A corpus from a small random grammar, the same on every machine, for the tiny models of the tests."""

from pathlib import Path
from random import Random

NOUNS = "river|stone|garden|letter|winter|signal|market|window|engine|teacher|cloud|harbour|café|naïveté"
VERBS = "carries|finds|follows|opens|paints|counts|repairs|remembers|sells|hides|crosses|answers"
ADJECTIVES = "small|quiet|bright|broken|early|heavy|green|distant|patient|über-fast"
PLACES = "near the harbour|behind the old mill|in Zürich|under the bridge|at noon|in São Paulo|in 東京"
PHRASES = "東京の駅で待つ。|天气很好。|🙂|naïve — café|▁ joins two words|Ω ≈ 3.14|🚀 off it went"
NAMES = "value|total|index|batch|token|width|result|buffer|offset|score"
CALLS = "load|parse|merge|update|encode|split|measure|round_up"


class Writer:
    """Random sentences and functions from a seed. The first words of a list are drawn most often."""

    def __init__(self, seed: int):
        self.random = Random(seed).random  # the same in every Python; other methods of Random may change

    def below(self, count: int) -> int:
        return int(self.random() * self.random() * count)

    def pick(self, *lists: str) -> list[str]:
        return [words[self.below(len(words))] for words in (text.split("|") for text in lists)]

    def sentence(self) -> str:
        words = self.pick(NOUNS, VERBS, NOUNS, ADJECTIVES, PLACES, ".|.|!|?")
        text = "The {3} {0} {1} the {2} {4}{5}".format(*words)
        return f"{text} {self.pick(PHRASES)[0]}" if self.random() < 0.12 else text

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(3 + self.below(4))) + "\n\n"

    def function(self) -> str:
        call, name, other = self.pick(CALLS, NAMES, NAMES)
        lines = [f"def {call}_{name}({name}, {other}={self.below(100)}):", f'    """{self.sentence()}"""']
        for _ in range(1 + self.below(3)):
            lines += [f"    for {other} in range({self.below(32)}):"]
            called, more = self.pick(CALLS, NAMES)
            lines += [f"        {name} += {called}({other}, {more}, {self.below(1000)})"]
        return "\n".join([*lines, f"    return {name} if {name} > {other} else None", "", "", ""])


def write_corpus(folder: Path) -> list[Path]:
    """Write 24 UTF-8 files to the folder, half prose and half code, 200 KB altogether; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part{number:02}.{('txt', 'py')[number % 2]}" for number in range(24)]
    for number, path in enumerate(paths):
        writer, text = Writer(number), ""
        while len(text.encode()) < 8200:
            text += writer.function() if path.suffix == ".py" else writer.paragraph()
        path.write_bytes(text.encode())
    return paths
