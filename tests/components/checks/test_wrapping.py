"""What is around a caption is taken off, what can't be told from it is asked again, and a caption stays as it is.

In the lists, § stands for the caption and ¤ for a model's reasoning.
"""

import itertools
import json

import pytest

from components.checks.wrapping import extract_caption, wrapping

CAPTION = "A ball moves slowly from the left to the right, over coloured bars; a clock counts in the corner."
THOUGHT = "The user wants a caption of the video. Let me look at the frames one by one; I see a ball and bars."

REASONING = [
    "¤</think>\n\n§",
    "<thinking>¤</thinking>§",
    "<think>a</think><think>¤</think>§",
    "<THINK>¤</THINK>§",
    "Okay.\n<think>¤</think>\n§",
    "<seed:think>¤<seed:cot_budget_reflect>used 10</seed:cot_budget_reflect></seed:think>§",
    "[THINK]¤[/THINK]§",
    "◁think▷¤◁/think▷§",
    "<reasoning>\n¤\n</reasoning>\n§",
    "<|begin_of_thought|>¤<|end_of_thought|>\n<|begin_of_solution|>§<|end_of_solution|>",
    "<|START_THINKING|>¤<|END_THINKING|><|START_RESPONSE|>§<|END_RESPONSE|>",
    "<think>a<think>b</think>c</think>§",
    "<think>I must close the <think> tag here now ok</think>§",
    "<mm:think>¤</mm:think>\n§",
    "<longcat_think>¤</longcat_think>§",
    "&lt;think&gt;¤&lt;/think&gt;§",
    "<think>¤</think><answer>§</answer>",
    "§<think>Is it ok? yes I think it is good enough.</think>",
    "§\n<think>Hmm let me check",
    "<|channel>thought\n¤<channel|>§",
    "<unused94>thought\n¤<unused95>§",
    "<|channel|>analysis<|message|>We need to write.<|end|><|start|>assistant<|channel|>final<|message|>§",
    "<|channel|>analysis<|message|>We need to write.<|end|><|start|>assistant<|channel|>final<|message|>§<|return|>",
    "<|channel|>analysis<|message|>We need to write.<|end|>§",
    "analysisWe need to write a caption.assistantfinal§",
    "We need to produce it. Let's produce final output.assistantfinal§",
    '<|start|>assistant<|channel|>final <|constrain|>json<|message|>{"caption": "§"}<|end|>',
    "Here is my thought process:\n¤\n\nHere is my response:\n§",
    "**Thinking:** ¤\n\n**Final Caption:** §",
    "<SUMMARY>I will describe it.</SUMMARY><CAPTION>The picture shows a ball that moves.</CAPTION>"
    "<REASONING>¤</REASONING><CONCLUSION>§</CONCLUSION>",
]

JSON = [
    '{"caption": "§"}',
    '```json\n{"caption": "§"}\n```',
    '{"description": "§", "objects": ["ball"], "confidence": 0.9}',
    '["§"]',
    '"§"',
    '{"video": {"caption": "§"}}',
    '[{"caption": "§"}]',
    '{"reasoning": "¤", "caption": "§"}',
    '{"frames": [{"frame": 1, "description": "a ball on the left side of the picture"}], "caption": "§"}',
    '{"caption": "§"}\n\nLet me know if you need more!',
    'Sure! Here is the caption in JSON:\n{"caption": "§"}',
    'Here is the JSON:\n\n```json\n{\n "caption": "§"\n}\n```\n\nI hope this helps!',
    "{'caption': '§'}",
    '{"caption": "Sure! Here is a caption: §"}',
    '[{"type": "text", "text": "§"}]',
    '"{\\"caption\\": \\"§\\"}"',
    '<tool_call>\n{"name": "write", "arguments": {"caption": "§"}}\n</tool_call>',
    "caption: §",
    "caption: |\n  §",
    "caption: >-\n  §",
    "```\n§\n```",
    "```text\n§\n```",
    "```markdown\n**Caption:** §\n```",
    "Here is the caption:\n\n```\n§\n```\n\nLet me know!",
    '```json\n{"caption": "§"}',
    "```§```",
    "`§`",
]

WORDS_TO_THE_READER = [
    'Sure! Here is a detailed caption for the video:\n\n"§"',
    "Certainly! §",
    "Here's the description: §",
    "Of course. Here is a description of the video.\n\n§",
    "Based on the provided frames, here is a detailed description of the video: §",
    "I'd be happy to help! Here's a caption:\n§",
    "Okay, here is the revised description, with 120 words:\n\n§",
    "The following is a detailed description of the video: §",
    "Sure thing! §",
    "Here is a caption for the video based on the frames and the prompt:\n\n§",
    "Great! Here's a detailed caption:\n\n§",
    "I have written a description of the video.\n\n§",
    "Thank you for the feedback. Here is the revised description:\n\n§",
    "Below is the corrected caption:\n\n§",
    "**Revised Description:**\n\n§",
    "Absolutely! Let me describe the video. §",
    "This is a detailed caption for the video:\n§",
    "Here you go:\n\n§",
    "Sure, here's one: §",
    "§\n\nLet me know if you need anything else!",
    "§ I hope this helps!",
    "§\n\n(Word count: 30)",
    "§\n\nWord count: 28 words",
    "§ (28 words)",
    "§\n\nNote: This description is based on the frames provided.",
    "§\n\n---\n\nWould you like me to change anything?",
    "§\n\nThis description captures the essence of the video. Feel free to ask for changes!",
    "§\n\n[End of description]",
    "§\n\nTags: ball, bars, clock",
    "§\n\n#ball #bars #clock",
    "§\nUser: Another one?\nAssistant: Here is another caption.",
    "§\n\nPlease let me know if you'd like a longer version.",
    "§ Is there anything else you would like to know?",
]

MARKDOWN = [
    "# Video Caption\n\n§",
    "**A Ball in Motion**\n\n§",
    "### Description\n§",
    "**§**",
    "*§*",
    "> §",
    "**Caption**: §",
    "*Caption:* §",
    "__Description__: §",
    "Caption: §",
    "CAPTION: §",
    "Video description: §",
    "Title: A Ball\n\nCaption: §",
    "**Title:** A Ball\n**Description:** §",
    "- §",
    "## Caption\n\n§\n\n---",
    "Caption\n=======\n§",
    "Description - §",
    "[Caption]: §",
    "Detailed caption of the video: §",
]

CHAT_TOKENS = [
    "§<|im_end|>\n<|im_start|>assistant",
    "§</s>",
    "§<|eot_id|>",
    "[/INST] §</s>",
    "§<end_of_turn>",
    "<start_of_turn>model\n§<end_of_turn>\n<eos>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n§<|eot_id|>",
    "<|im_start|>assistant\n§<|im_end|>",
    "§<|im_end|>\n<|im_start|>user\nAnd another one please?<|im_end|>\n<|im_start|>assistant\n"
    "Another caption of a video with a ball.",
    "<|im_start|>system\nYou are it.<|im_end|>\n<|im_start|>user\n"
    "Describe the video with the ball please.<|im_end|>\n<|im_start|>assistant\n§<|im_end|>",
    "<s>[INST] Describe the video with a ball please. [/INST] §</s>",
    "<｜Assistant｜>§<｜end▁of▁sentence｜>",
    "§<|end|>",
    "§<|endoftext|>",
    "<|assistant|>\n§<|user|>",
    "<|begin_of_box|>§<|end_of_box|>",
    "[|assistant|]§[|endofturn|]",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>§<|END_OF_TURN_TOKEN|>",
    "<|vision_start|><|image_pad|><|vision_end|>§",
    "<image>\n§",
    "ASSISTANT: §",
    "Assistant: §",
    "§<pad><pad><pad>",
    "assistant\n§",
    "§<end_of_utterance>",
    "<|start_of_role|>assistant<|end_of_role|>§<|end_of_text|>",
    "<|header_start|>assistant<|header_end|>\n\n§<|eot|>",
    "=== 0123456789abcdef ===\n§\n=== 0123456789abcdef ===",
    "<unk>§",
    "<s>[INST] <<SYS>>\nBe good.\n<</SYS>>\n\nDescribe the video now please. [/INST] § </s>",
]

BOXES = [
    "<ref>a ball</ref><box>(10,20),(30,40)</box> §",
    "§ <ref>a ball</ref><box>(1,2),(3,4)</box>",
    "<ref>a ball</ref><box>(1,2),(3,4)</box><ref>a clock</ref><box>(1,2),(3,4)</box>\n§",
]

FRAMES = [
    "Frames 1-8: §",
    "[00:00 - 00:05] §",
    "Frame 1: §",
]

TAGS = [
    "<caption>§</caption>",
    "<caption>§",
    "§</caption>",
    "<video_description>\n§\n</video_description>",
    "<p>§</p>",
    "<foo>§</foo>",
    "<div><p>§</p></div>",
    '<?xml version="1.0"?><caption lang="en">§</caption>',
    "Sure!\n<caption>§</caption>\nLet me know!",
    "\\boxed{§}",
    'Okay.\n\n**Caption:**\n\n> "§"\n\nI hope this helps!',
    '<think>¤</think>\n\nSure! Here is the caption:\n\n```json\n{"caption": "§"}\n```\n<|im_end|>',
    "Bien sûr ! Voici une description détaillée de la vidéo :\n\n§",
    "Hier ist die Beschreibung des Videos: §",
]
QUOTES = [
    "“§”",
    '"§"',
    "'§'",
    "«§»",
    '"""§"""',
]

# For "a clock" in the caption.
INLINE = [
    "<ref>a clock</ref><box>(10,20),(30,40)</box>",
    "<|object_ref_start|>a clock<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>",
    "<ref>a clock</ref><box>[[10, 20, 30, 40]]</box>",
    "<phrase>a clock</phrase><object><patch_index_0044><patch_index_0863></object>",
    "a clock<loc_12><loc_34><loc_56><loc_78>",
    "a clock [0.123, 0.456, 0.789, 0.999]",
    "a clock[[010,020,030,040]]",
    '<point x="10.5" y="20.1" alt="a clock">a clock</point>',
    "<p>a clock</p> {<12><34><56><78>}",
    "<|ref|>a clock<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
    "<b>a clock</b>",
    "**a clock**",
    "[a clock](https://example.com/clock)",
]

# Asked for again.
DOUBTFUL = [
    "<think>\n¤ and so on",
    "<|channel|>analysis<|message|>We need to write.",
    "¤",
    "A ball moves <think>hm</think> to the right side of a wide road in the light.",
    '{"caption": ["§", "Another caption of the video with a ball."]}',
    '{"caption": "A small picture with a test',
    '[{"frame": 1, "description": "a ball left of the bars"}, {"frame": 2, "description": "a ball right of them"}]',
    "```\n§\n```\n```\nAnother caption of the same video here.\n```",
    "**Caption:** §\n\n- bullet\n\nLet me know if you need anything else!",
    "The video shows:\n- a red ball on the left\n- a blue clock on the right",
    "### Setting\nA street in the light of morning.\n### Action\nA man walks along it slowly.",
    "Subject: a red ball that moves\nAction: it moves to the right side\nCamera: the camera is still",
    "Option 1: §\n\nOption 2: Second sentence here is a description too: the light is warm.",
    "| frame | text |\n|---|---|\n| 1 | a ball |",
    "Frame 1: a ball on the left side. Frame 2: a ball in the middle.",
    "[00:00 - 00:02] A ball moves to the left side. [00:02 - 00:04] A ball moves back.",
    "Frame 1:\nA ball on the left side.\nFrame 2:\nA ball on the right.",
    "0.0s - 0.5s: A ball moves to the left side. 0.5s - 1.0s: A ball moves back.",
    "<ul><li>a ball moves</li><li>a clock counts</li></ul>",
    "AĠsmallĠpictureĠwithĠaĠball",
    "▁A▁small▁picture▁with▁a▁ball",
]

# Captions as they are.
CAPTIONS = """
A laptop shows the code {"name": "ball"} on a dark screen while a cat walks over the keyboard.
"Open" reads one sign and the other says "Closed"
"STOP" is written on a red sign by the road, and a car waits in front of it.
{OPEN} is painted on the door of a shop, and people walk by.
[EXIT] glows in green above a door in a dark hallway.
A man thinks while he looks out of the window; he seems to think of nothing at all.
Three things lie on the table: (1) a ball, (2) a clock, (3) a map of the city.
A sign reads "<think>" in white letters above a desk.
A poster says "[THINK]" twice, once in red and once in blue.
Here is a quiet street in the morning: a dog runs along it, and a car passes.
Here a caption card is shown with the words Once Upon a Time.
A whiteboard shows 5 < 6 > 4 and x<y and z>3 in blue ink.
A screen shows HTML code such as <div> and </div> in green letters.
Sure footed goats climb a steep rock while the wind blows.
Okay is written in big letters on a wall, and a child points at it.
Great waves crash on a dark beach under a sky of heavy clouds.
The video shows the following: a ball, a clock, and bars of many colours.
A sign with the caption: "Hello" hangs on a wall of brick.
Note the blue light: it comes from a window on the left side.
In the first frame of the comic strip, a mouse sits; the camera pans to the second one.
A terminal shows `ls -la` and a list of files in green.
Thank you is written on a card that a hand puts on a table.
The screen reads "Thank you for watching." and fades to black.
A man in a cap wears number 10; the clock says 12:30, and the score is 3:2.
C# code is shown on a screen; the cursor blinks after x_1 * y_2 * z_3.
An actor says: "Let me know if you need anything else!" and leaves the room.
Model trains run around a small town of wood and paper.
Human hands knead dough on a table that is white with flour.
User interfaces of many colours slide over a wall of screens.
The price tag says $5 and the other says $10; #sale is written below.
A hashtag, #love, glows in pink neon above the bar.
Title cards in white letters appear: The End, and the curtain falls.
一只红色的狗在宽阔的海滩上奔跑，傍晚的阳光照在它的毛上，镜头从侧面慢慢地跟随着它，背景是平静的大海。
كلب أحمر يركض على الشاطئ الواسع في ضوء المساء، والكاميرا تتبعه ببطء من الجانب الأيسر
Ein roter Hund läuft über den Strand, und die Kamera folgt ihm langsam von der Seite. 🐕‍🦺
A digit moves.
a red seven on black moving left slowly, starting at the centre and ending at the left.
A person types {"caption": "x"} into a form and then presses the button.
A robot assistant: close-up of its face, which turns to the camera and smiles.
Scene: a dark street, and a lamp that flickers over it.
A man holds a sign that says "I'm sorry" and "Forgive me"
At 0:05 on the clock the player shoots; the ball hits the net at 0:02.
The description on the box says fragile, and a hand lifts it.
A child reads aloud from a book, "The cat sat on the mat," and laughs.
The user interface of a game is shown, and the user wins.
We need to talk is written on a phone's screen; the hand that holds it shakes.
"A quote at the start," says a man, and then he walks away into the rain.
The camera pans left - right - left over a field of corn.
A slide shows three points: - speed - power - grace, in white on blue.
A man says he will describe the video later; he closes the laptop.
Two scenes follow: in scene 1 a man walks, in scene 2 he runs.
The answer: 42, is written on a board in white chalk.
Response teams in yellow coats run along a flooded street.
The screen of the phone is 12" wide, and a hand touches it.
A man at a desk reads a page with the words analysis and final in bold letters.
A dog (a young beagle) runs - almost flies - over a meadow; its ears flap, its tongue hangs out, and it barks.
The word "Sale" blinks in a shop window, "50% off" below it, while people with bags pass by.
A road sign: 80 km/h. A car passes it at speed.
"""


def fill(template):
    return template.replace("§", CAPTION).replace("¤", THOUGHT)


@pytest.mark.parametrize(
    "template", [*REASONING, *JSON, *WORDS_TO_THE_READER, *MARKDOWN, *CHAT_TOKENS, *BOXES, *FRAMES, *TAGS, *QUOTES]
)
def test_what_is_around_a_caption_is_taken_off(template):
    assert extract_caption(fill(template)) == (CAPTION, "")


@pytest.mark.parametrize("form", INLINE)
def test_what_marks_a_word_in_a_caption_is_taken_off(form):
    assert extract_caption(CAPTION.replace("a clock", form)) == (CAPTION, "")


@pytest.mark.parametrize("template", [*DOUBTFUL, "[" * 200 + '"§"' + "]" * 200, '{"a":' * 5000])
def test_what_can_not_be_told_from_a_caption_is_asked_again(template):
    text, complaint = extract_caption(fill(template))
    assert complaint.startswith(("it holds", "it is", "it begins"))
    assert text == " ".join(fill(template).split())
    assert wrapping(fill(template)) == complaint


@pytest.mark.parametrize("text", CAPTIONS.strip().splitlines())
def test_a_caption_with_braces_quotes_or_lists_stays_as_it_is(text):
    assert extract_caption(text) == (text, "")
    assert wrapping(text) == ""


OUTER = [
    "Sure! Here is the caption:\n\n%s",
    "```\n%s\n```",
    "**Caption:** %s",
    "%s\n\nLet me know if I can help!",
    "%s<|im_end|>",
]
INNER = ["<think>¤</think>%s", '"%s"', "<caption>%s</caption>", "%s\n\n(Word count: 20)", "[/INST] %s</s>"]


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(OUTER, INNER)])
def test_wrappings_may_be_around_one_another(outer, inner):
    assert extract_caption(fill(outer % inner % "§")) == (CAPTION, "")
    asked = json.dumps({"caption": fill(outer % inner % "§"), "confidence": 0.9})
    assert extract_caption(asked) == (CAPTION, "")


@pytest.mark.parametrize("template", [*REASONING, *CHAT_TOKENS, *BOXES, *TAGS, *WORDS_TO_THE_READER])
def test_a_caption_from_elsewhere_is_named_for_what_is_around_it(template):
    assert wrapping(fill(template)).startswith("it ")


@pytest.mark.parametrize("text", [*QUOTES, f"*{CAPTION}*", CAPTION.replace(" slowly", " *slowly*"), f"  {CAPTION}\n"])
def test_a_caption_from_elsewhere_may_be_in_quotes_or_italics(text):
    assert wrapping(fill(text)) == ""


def test_paragraphs_become_one_line():
    assert extract_caption("A ball moves.\n\nThe clock  counts.\n") == ("A ball moves. The clock counts.", "")


@pytest.mark.parametrize(
    "unit", ["<think>", "*", "```\n", "{", '"a",', "\n", "> a\n", "[1,2,3,4]", "<|im_end|>", "Sure! ", "a "]
)
def test_a_text_made_to_be_slow_takes_a_moment_only(unit):
    extract_caption(unit * (19_000 // len(unit)))
    extract_caption(f"<think>{unit * (390_000 // len(unit))}</think>{CAPTION}")
