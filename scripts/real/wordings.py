"""How a photograph is asked about: wordings that the projector is trained on, and others that nothing is."""

from __future__ import annotations

TRAINED: dict[str, tuple[str, ...]] = {
    "what": (
        "What is this?", "What is in the picture?", "Which object is this?", "What is shown here?",
        "What do you see in the image?", "What does the picture show?",
    ),
    "caption": ("a photo of", "an image of", "this is a picture of"),
}  # fmt: skip
# Of the benchmark's rephrased prompts. No backbone is trained on them.
FREE: dict[str, tuple[str, ...]] = {
    "what": (
        "Tell me, what am I looking at?", "Can you name the thing in this photo?",
        "How would you call what the photo shows?", "What has been photographed here?",
        "In a word or two, what appears in this image?", "What might this be?",
        "Someone took a picture of something: what was it?", "What would you say this is?",
        "Could you identify the main thing in this photograph?", "Which thing is the subject of this photo?",
        "What is the camera pointed at?", "Please name what is visible.",
        "If you had to label this photo, which label would fit?", "What sort of thing is that?",
        "What is it that we see here?", "Give the name of what stands out in the picture.",
        "What can be made out in this shot?", "Looking at the photo, what do you recognise?",
        "A child points at this picture and asks its name: what is it?", "What is the photograph of?",
        "Under which word would this image be filed?", "What does this snapshot contain?",
    ),
    "caption": (
        "here we can see", "the camera caught", "in this shot there is", "what we have here is",
        "the picture was taken of", "somebody photographed", "a close look at", "the subject here is",
        "you are looking at", "a snapshot that shows", "this photograph is about", "the frame is filled by",
        "on this photo one finds", "a view of", "the image contains", "in front of the lens was",
        "caught on film:", "the main thing in this picture is", "shown above is", "this shot features",
        "a picture that somebody took of", "visible in the image is",
    ),
    "choice": (
        "Would you say {x} or {y}?", "{X} or {y}: which one do we see?", "Does the photo show {x} or {y}?",
        "Tell me which it is: {x}, or {y}?", "Of {x} and {y}, which one is in the picture?",
        "I can't decide between {x} and {y}. Which is it?", "Looking at it, is it {x} or {y}?",
        "One of the two is shown, {x} or {y}. Which one?", "What was photographed, {x} or {y}?",
        "Choose one: {x} or {y}.", "Should this be filed under {x} or under {y}?",
        "Has somebody taken a picture of {x} or of {y}?", "Could it be {x}, or is it {y}?",
        "Am I looking at {x} or at {y}?", "Which word fits the image, {x} or {y}?",
        "Is the thing in the image {x} or {y}?", "Between {x} and {y}, what do you recognise here?",
        "Some say {x}, others say {y}. Who is right?", "Pick what you see: {x} or {y}?",
        "Which describes the photograph, {x} or {y}?", "Is what we have here {x} or {y}?",
    ),
}  # fmt: skip
# In which a benchmark asks for the edit. Choices between two names are not trained on.
ASKED: dict[str, tuple[str, ...]] = {
    "what": TRAINED["what"],
    "caption": TRAINED["caption"],
    "choice": ("Is this {x} or {y}?", "Which of the two is it, {x} or {y}?"),
}


def fill(wording: str, first: str = "", second: str = "") -> str:
    """The wording with two nouns in it."""
    return wording.format(x=first, X=first[:1].upper() + first[1:], y=second)
