"""Says which words of a prompt a model doesn't know, and which it knows.

A large subword tokenizer has pieces for every text, so only its unknown token shows such a word. A small tokenizer
spells words that it doesn't know, letter by letter.
"""

from typing import Any

from components.cli.messages import say

SMALL = 5000  # tokens: with fewer, a word that is spelled is unknown, and the known words can be listed
LISTED = 80  # known words in a message
SHORTEST = 3  # letters of a listed word
_MARKS = "▁Ġ#"  # of a word's start or continuation, in vocabularies


def warn_of_unknown_words(prompt: str, tokenizer: Any) -> None:
    """Say which words of the prompt the model doesn't know, if there are any, and which words it knows."""
    if said := describe_unknown_words(prompt, tokenizer):
        say(said)


def describe_unknown_words(prompt: str, tokenizer: Any) -> str:
    """Which words of the prompt the model doesn't know, and which words it knows; empty if it knows all."""
    unknown = find_unknown_words(prompt, tokenizer)
    if not unknown:
        return ""
    words = ", ".join(f"'{_printable(word)}'" for word in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
    listed = known_words(tokenizer)
    known = f" It knows {', '.join(listed)}, and others." if listed else " Use other words."
    return f"This model doesn't know {words}; the clip may ignore {'them' if unknown[1:] else 'it'}.{known}"


def find_unknown_words(prompt: str, tokenizer: Any) -> list[str]:
    """The words of a prompt that the tokenizer can't represent, or, if it is a small one, has to spell."""
    words = dict.fromkeys(word for part in prompt.split() if (word := _strip(part)))
    return [word for word in words if _is_unknown(word, tokenizer)]


def known_words(tokenizer: Any) -> list[str]:
    """The most frequent words of a small vocabulary in alphabetical order; of a large one none.

    A trained tokenizer's ids are in the order of frequency.
    """
    if len(tokenizer) > SMALL:
        return []
    tokens = [token.lstrip(_MARKS) for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    words = [token for token in tokens if len(token) >= SHORTEST and token.replace("-", "").isalpha()]
    return sorted(list(dict.fromkeys(word for word in words if word.islower()))[:LISTED])


def _is_unknown(word: str, tokenizer: Any) -> bool:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return True
    if len(tokenizer) > SMALL:
        return False
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if len(pieces) == 1:
        return False
    spelled = sum(len(piece.lstrip(_MARKS)) == 1 for piece in pieces)
    return 2 * spelled > len(word)


def _strip(part: str) -> str:
    """A word without punctuation around it."""
    while part and not part[0].isalnum():
        part = part[1:]
    while part and not part[-1].isalnum():
        part = part[:-1]
    return part


def _printable(text: str) -> str:
    """Text without control characters, which a terminal would interpret."""
    return "".join(character for character in text if character.isprintable())
