"""The base's tokenizer: every common word of the dataset is one token, and other ASCII text becomes characters."""

import math
import re
from collections import Counter

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from components.digits.worlds import DIGITS, World

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"

# Words that users write about such clips but the dataset's own sentences don't contain.
_MORE_WORDS = """
about across after against all along also always an and another any are around as away back be because before behind
below beneath between big both bright but by can change changes clear clearly clip colour coloured constant corner
dark during each edge entire every everything first fixed for frames full goes gray center has have here high
horizontally image in inside into is it its just keeps large last left light line little low made many middle more
most motion movement moved near never next no not of off once only onto or out over own part pixel place plain
position quick quietly rests right same scene screen second seen shape short side simple single size small smooth
smoothly solid some stays steady steadily still straight symbol than that their then there these thin third this
through throughout time to together top toward towards two under until upper lower upward upwards downward downwards
leftward leftwards rightward rightwards vertically very video view visible was way we where which while whole wide
with within without
"""


def corpus(lines: int, seed: int, kind: World = DIGITS) -> list[str]:
    """Prompts and captions of random scenes of a world, `lines` of each."""
    rng = np.random.default_rng(seed)
    drawn = [kind.sample(rng) for _ in range(lines)]
    return [write(scene, rng) for scene in drawn for write in (kind.write_prompt, kind.write_caption)]


def build_tokenizer(texts: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over the words of `texts`, with all single ASCII characters as a fallback.

    Ids: pad 0, eos 1 (appended to every text), unknown 2 (characters outside ASCII that have no ASCII form). ASCII text
    decodes to itself, but for blanks at its start. A word's score is its log frequency, and a character's is so low
    that no word of the vocabulary is ever spelled.
    """
    words = Counter()
    for text in texts:
        for chunk in text.split(" "):
            for i, piece in enumerate(re.findall(r"[\w-]+|[^\w\s]", chunk)):
                words["▁" + piece if i == 0 else piece] += 1
    # A word may open a text of a user in either case, whatever case the corpus happened to use.
    for word in [w for w in words if w.startswith("▁") and len(w) > 2]:
        words.setdefault(word.lower(), 1)
    for word in _MORE_WORDS.split():
        words.setdefault("▁" + word, 1)
    total = sum(words.values())
    vocabulary = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, -100.0)]
    vocabulary += [
        (word, math.log(count / total)) for word, count in sorted(words.items(), key=lambda w: (-w[1], w[0]))
    ]
    vocabulary += [
        (character, -25.0) for character in ["▁", "\n", "\t", *map(chr, range(33, 127))] if character not in words
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
