"""Which image belongs to which prompt or conversation, and where in it.

For processor.py. Images come as one, as a flat list in reading order, as a list per row, or inside
the messages; from here on a row has its list, and a conversation a part for each image.
"""

from itertools import islice

from PIL import Image

from llava_min.checks.chat import check_messages
from llava_min.checks.processor import check_image_list, check_images, check_one_place
from llava_min.data.chat import count_images, marks_to_parts, split_content

Images = Image.Image | list[Image.Image] | list[list[Image.Image]] | None


def as_list(images: Images) -> list:
    images = [] if images is None else [images] if isinstance(images, Image.Image) else images
    check_image_list(images)
    return images


def split_images(images: list, counts: list[int | None]) -> list[list[Image.Image]]:
    """Images, flat in reading order or a list per row -> the images of each row.

    `counts`: how many each row marks; None where it takes what it is given. Raises UserError if
    they do not fit.
    """
    check_images(images, counts)
    if any(isinstance(row, (list, tuple)) for row in images):
        return [list(row) for row in images]
    if all(n is None for n in counts):
        counts = [1] * len(counts) if len(counts) > 1 else [len(images)]
    rest = iter(images)
    return [list(islice(rest, n or 0)) for n in counts]


def place_images(talks: list, images: Images) -> tuple[list[list[dict]], list[list[Image.Image]]]:
    """(conversations in which every image is a part of a message, the images of each). How a
    caller may give them: `Processor.chat`.
    """
    for talk in talks:
        check_messages(talk)
    contents = [m["content"] for talk in talks for m in talk if isinstance(m["content"], list)]
    held = [part.get("image") for content in contents for part in content]
    held = [image for image in held if image is not None]
    check_one_place(held, images)
    images = held or as_list(images)
    if not images:  # `<image>` in a text is text
        return talks, split_images([], [count_images(talk) for talk in talks])

    talks = [talk if count_images(talk) else marks_to_parts(talk) for talk in talks]
    rows = split_images(images, [count_images(talk) or None for talk in talks])
    for i, row in enumerate(rows):
        if row and not count_images(talks[i]):
            talks[i] = put_first(talks[i], len(row))
    return talks, rows


def put_first(messages: list[dict], images: int) -> list[dict]:
    """The messages with image parts in the first one of the user."""
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
    if first is None:
        return messages  # which no template takes
    texts = [{"type": "text", "text": text} for text in split_content(messages[first])[1]]
    with_images = messages[first] | {"content": [{"type": "image"}] * images + texts}
    return [*messages[:first], with_images, *messages[first + 1 :]]
