"""Refusals in many wordings are found, and descriptions aren't mistaken for them."""

import pytest

from components.checks.refusal import refusal

REFUSALS = """
I'm sorry, but I can't help with describing this video.
I’m sorry, but I can’t assist with that.
I am unable to view the video.
Iʼm sorry, I canʼt do that.
I cannot describe this.
I can't help with that request.
As an AI language model, I don't have eyes.
As an AI, I cannot watch videos.
Sorry, but the content is not something I can describe.
Sorry, I can't see the frames.
Unfortunately, I am not able to provide a description of this video.
I apologize, but I cannot fulfill this request.
My apologies, this is not possible.
No video was provided.
No images were attached to the message.
There is no video attached.
It seems that no video was provided. Please upload the video.
It looks like you haven't attached any video.
You have not provided any frames.
Please provide the video so that I can describe it.
Could you please share the images?
I don't see any images in this conversation.
I do not have the ability to view videos.
I don't have access to the video.
I must decline to describe this.
I must respectfully decline.
I won't describe this content.
This request violates our content policy.
Describing this would be against my guidelines.
This goes against the safety guidelines.
It is not possible to describe the video.
Unable to process the video.
I need to see the video to describe it.
While I appreciate your request, I can't help with that.
Thank you for sharing. However, I cannot describe the people in it.
We're sorry, but we can't process this.
The video cannot be played.
Your request was rejected as a result of our safety system.
"I'm sorry, but I can't describe this."
**I'm sorry, but I can't describe this.**
I’d rather not describe this.
I'm just a language model and can't see.
I'm not comfortable describing this.
I regret that I cannot do this.
Ｉ'm sorry, I can't.
抱歉，我无法描述这个视频。
很抱歉，我不能提供帮助。
您好，我无法查看视频。
申し訳ありませんが、お手伝いできません。
죄송합니다. 설명할 수 없습니다.
Je suis désolé, mais je ne peux pas décrire cette vidéo.
Es tut mir leid, aber ich kann dieses Video nicht beschreiben.
Ich kann dieses Video leider nicht beschreiben.
Lo siento, no puedo ayudar con eso.
Desculpe, não posso ajudar.
Mi dispiace, non posso aiutarti.
Извините, я не могу описать это видео.
عذراً، لا أستطيع وصف الفيديو.
Üzgünüm, bu videoyu açıklayamam.
Xin lỗi, tôi không thể mô tả video này.
Maaf, saya tidak dapat membantu.
Het spijt me, ik kan dit niet beschrijven.
क्षमा करें, मैं मदद नहीं कर सकता।
I can’t comply with this.
I can not see the video.
Hmm, I can't view that clip.
I cannot assist with identifying people.
I'm afraid I can't do that.
A person is shown. I'm sorry, but I can't identify who it is.
I’m unable to view the video you mention.
I cannot really describe what happens here.
As an AI language model, I only work with text.
We are sorry; this violates our content policies.
No frames were provided, so here is a guess.
"""
DESCRIPTIONS = """
A man who can't swim clings to a rope while waves break over the deck of a small boat.
A sign reads "I'm sorry, we are closed" on the door of a shop.
A woman says, “I can't help it,” and laughs at the camera.
As an AI-controlled car drives along the road, a robot waves.
A boat rubs against the guidelines of the pool as swimmers pass.
The subtitle reads I'm sorry but I can't stay, in white letters.
A robot cannot describe a circle with its arm; it draws a square instead.
I can see a red ball that moves to the left across a wooden table.
The screen shows an error: 'cannot open file', and a man shakes his head.
A child cannot help but laugh as a puppy licks its face.
A sorry-looking dog sits in the rain by a closed door.
There are no people. The street is empty in the morning light.
The wall is bare. There are no pictures on it.
A sad clown apologizes to a crowd with a deep bow.
The video shows a man who won't help his friend move a sofa.
No images of the past remain in the ruined temple; vines cover the walls.
Maafushi island lies in a blue lagoon, and boats come and go.
A teacher asks the class to provide answers on a whiteboard.
The player does not see the ball, and it flies past him.
A police officer denies a request and points to the exit.
A person with a sign "Please help" sits on the pavement.
The frame is empty. A hand enters from the left and places a vase.
It is impossible to see the far shore through the fog.
Please Don't Feed The Birds, says a sign at the pond.
I walk along a road; I can't see far because of the fog.
A text on the screen says: Sorry. A hand wipes it away.
Sorry is written in white chalk on a blackboard.
The man is unable to lift the heavy barbell and lets it fall.
Unable to lift the heavy box, the man sits down on it.
A café in Paris, with the word Désolé on a closed door.
The screen can't be seen from this side; light falls on a face.
Leider ist der Himmel grau, und ein Hund läuft über den nassen Strand.
一个男人不能游泳，他紧紧抓住绳子，海浪拍打着小船的甲板。
We are in a kitchen. A cook cuts onions with a large knife.
This picture of a cat can be described as playful; the cat jumps.
A judge in a courtroom: the motion is denied, and a gavel falls.
A voice says "As an AI, I cannot feel", and a robot turns its head.
No video screens are lit in the dark arena, until one flashes red.
A guard refuses to let a man pass and holds up a hand.
A boy looks sorry for what he did, and his mother smiles at him from the door.
A robot that cannot see walks into a wall, while a scientist watches it on a screen.
An eye opens, and a policeman helps a woman across the road. Nothing else is in the frame.
"""


@pytest.mark.parametrize("text", REFUSALS.strip().splitlines())
def test_a_refusal_is_found(text):
    assert refusal(text)


@pytest.mark.parametrize("text", DESCRIPTIONS.strip().splitlines())
def test_a_description_is_not_a_refusal(text):
    assert refusal(text) == ""


def test_a_refusal_is_quoted():
    assert refusal("Thank you. I\u2019m sorry, but I can\u2019t help.") == "i'm sorry"
