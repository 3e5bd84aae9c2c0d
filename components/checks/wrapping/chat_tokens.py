"""Tokens of chat templates in a text: they delimit turns, and only the model's first turn is the answer."""

import re

from components.checks.texts import words
from components.checks.wrapping.common import PROSE, Ambiguous, is_prose, shown

# Tokens of ChatML, Llama, Gemma, Mistral, DeepSeek, Cohere, GLM, EXAONE, harmony and others, and of tokenizers.
_TOKEN = re.compile(
    r"<\|[^<>|\n]{1,64}\|>|<｜[^<>｜\n]{1,64}｜>|<\|[a-z_]{1,32}>|<[a-z_]{1,32}\|>|\[\|[^\[\]|\n]{1,32}\|\]"
    r"|</?s>|<(?:eos|bos|pad|unk|eod|sop|eop|cls|sep|mask|eot|eom)>|</?(?:start|end|begin)_of_\w{1,24}>"
    r"|</?im_(?:start|end|patch)>|\[/?INST\]|<</?SYS>>"
    r"|\[(?:PAD|CLS|SEP|UNK|MASK|EOS|BOS|gMASK|sMASK|IMG(?:_BREAK|_END)?|/?SYSTEM_PROMPT|/?AVAILABLE_TOOLS"
    r"|/?TOOL_(?:CALLS|RESULTS|CONTENT))\]"
    r"|<(?:unused\d{1,3}|extra_id_\d{1,3}|reserved_\w{1,40}|0x[0-9A-Fa-f]{2}|image_soft_token|IMG_CONTEXT|/?img"
    r"|/?images?|/?videos?|image_pad|video_pad|/?vision|frame[ _]?\d{1,4}|end|(?:image|video|vid)_?\d{1,4})>"
)
_BOXED = re.compile(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)", re.DOTALL)
_NAMES_ROLE = re.compile(r"(?:im_)?start(?:_header|_of_turn|_of_role)?|header_start|role_start|turn")
_ENDS = re.compile(
    r"im_end|eot|eom|end|return|call|stop|/s|eos|eod|eop|turn|endoftext|end_response"
    r"|end_?of_?(?:text|turn|utterance|sentence|message|assistant|response)"
)
_BEGINS = re.compile(r"s|bos|sop|begin_?of_?(?:text|sentence)|start_response")
_WHOLE = re.compile(r"[.!?…。！？\"”’')\]}>]\s*$")
_USER = {"user", "human", "inst", "system", "sys", "system_prompt", "observation", "tool"}
_OWN = {"assistant", "model", "chatbot", "/inst"}
_ROLE = re.compile(r"\s*(assistant|model|user|system|human|tool|developer|ipython|bot)\b:?\s*")


def own_turn(text: str) -> str:
    """The model's first turn in a text; the whole text if it has no tokens of a template."""
    if boxed := list(_BOXED.finditer(text)):
        return boxed[-1][1]
    tokens = list(shown(_TOKEN, text))
    if not tokens:
        return text
    turns = [part for part in _own_turns(text, tokens) if part.strip()]
    turn = next((turn for turn in turns if is_prose(turn)), turns[0] if turns else "")
    dropped = len(words(without_tokens(text))) - len(words(turn))
    if dropped >= PROSE and not _WHOLE.search(turn):
        raise Ambiguous("it holds tokens of a chat template; write plain text")
    return turn


def without_tokens(text: str) -> str:
    """A text with a space in place of each token of a chat template."""
    return _TOKEN.sub(" ", text)


def _own_turns(text: str, tokens: list[re.Match[str]]) -> list[str]:
    """The model's turns in order. The text before the first token is one, unless a token ends a user's turn there."""
    turns, own, end, role_follows = [""], True, 0, False
    for token in tokens:
        own = _add(turns, text[end : token.start()], own, role_follows)
        name, end = _name(token), token.end()
        role_follows = _NAMES_ROLE.fullmatch(name) is not None
        if name == "/inst" and text[end:].strip():
            turns.clear()
        if role_follows or name in _USER or name in _OWN or _ENDS.fullmatch(name) or _BEGINS.fullmatch(name):
            turns.append("")
            own = name not in _USER
    _add(turns, text[end:], own, role_follows)
    return turns


def _add(turns: list[str], part: str, own: bool, role_follows: bool) -> bool:
    """Add the text between two tokens to the last turn if it is the model's own; returns whether it is."""
    if role_follows and (role := _ROLE.match(part)):
        own, part = role[1] in (*_OWN, "bot"), part[role.end() :]
    if own:
        joined = turns[-1][-1:].isalnum() and part[:1].isalnum()
        turns[-1] += f" {part}" if joined else part
    return own


def _name(token: re.Match[str]) -> str:
    """A token's name: ``im_end`` of <|im_end|>, ``eot`` of <|eot_id|>, ``/inst`` of [/INST]."""
    name = token[0].strip("<>[]|｜").casefold().replace("▁", "_")
    return re.sub(r"(?:_id|_token)$", "", name)
