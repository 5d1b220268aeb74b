"""Features of images: the shapes and ranges that Isaac Lab's camera tasks deliver, and the random shift."""

import pytest
import torch
from torch.nn import functional as F

from m3po.errors import UserError
from m3po.models.image_encoder import ImageEncoder, random_shift


def frames(kind, count=4, seed=0):
    """Images as Isaac-Cartpole-Camera delivers them: a bar on a plain background, two frames of it."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.full((count, 2, 96, 96, 3), 200, dtype=torch.uint8)
    depth = torch.zeros(count, 2, 96, 96)  # metres; 0 is Isaac Lab's value of pixels that see nothing
    for image in range(count):
        left = int(torch.randint(10, 80, (), generator=generator))
        colours[image, :, 30:70, left : left + 6] = torch.tensor([220, 30, 30], dtype=torch.uint8)
        depth[image, :, 30:70, left : left + 6] = 5.0
    stacked = colours.movedim(-1, 2).flatten(1, 2)
    fractions = stacked / 255.0
    return {
        "rgb": (fractions - fractions.mean((2, 3), keepdim=True), (-0.5, 0.5)),
        "depth": (depth, (0.0, 20.0)),
        "raw": (colours[:, 0], (0.0, 255.0)),
        "showcase": ((fractions[:, :3]).movedim(1, -1).contiguous(), (0.0, 1.0)),
    }[kind]


SHAPES = {"rgb": (6, 96, 96), "depth": (2, 96, 96), "raw": (96, 96, 3), "showcase": (96, 96, 3)}


@pytest.mark.parametrize("kind", SHAPES)
def test_encodes_what_isaac_cartpole_camera_delivers(kind):
    images, value_range = frames(kind)
    assert images.shape[1:] == SHAPES[kind]
    torch.manual_seed(0)
    encoder = ImageEncoder(SHAPES[kind], 50, value_range)
    features = encoder(images)
    assert features.shape == (4, 50) and features.dtype == torch.float32
    assert features.isfinite().all() and 0.3 < features.std() < 3.0
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_bytes_fractions_and_both_layouts_are_the_same_image():
    pixels = torch.randint(0, 256, (3, 64, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for images, value_range in (
        (pixels, (0, 255)),
        (pixels / 255.0, (0, 1)),
        (pixels / 255.0 - 0.5, (-0.5, 0.5)),
        (pixels.movedim(-1, 1), (0, 255)),
    ):
        torch.manual_seed(0)
        results.append(ImageEncoder(images.shape[1:], 20, value_range).eval()(images))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_any_batch_is_encoded_image_by_image():
    images, value_range = frames("rgb", 6)
    encoder = ImageEncoder((6, 96, 96), 20, value_range).eval()
    batch = encoder(images)
    torch.testing.assert_close(encoder(images.unflatten(0, (2, 3))), batch.unflatten(0, (2, 3)))
    torch.testing.assert_close(encoder(images[2]), batch[2], rtol=1e-4, atol=1e-5)
    assert encoder(images[:0]).shape == (0, 20)


def test_only_training_moves_images_and_its_generator_decides_how():
    images, value_range = frames("rgb")
    encoder = ImageEncoder((6, 96, 96), 20, value_range)

    def encode(seed):
        return encoder(images, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(encode(0), encode(0))
    assert not torch.equal(encode(0), encode(1))
    assert torch.equal(torch.get_rng_state(), before)
    encoder.eval()
    assert torch.equal(encode(0), encode(1))
    assert torch.equal(encoder(images), encode(0))


def test_shifts_are_whole_pixels_with_the_border_repeated():
    """Each image of the batch is one of the (2 * 3 + 1)^2 crops of its padded self, all colours moved together."""
    images = torch.rand(64, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    moved = random_shift(images, 3, torch.Generator().manual_seed(1))
    crops = F.pad(images, (3, 3, 3, 3), mode="replicate").unfold(2, 9, 1).unfold(3, 11, 1)  # (64, 3, 7, 7, 9, 11)
    same = (crops == moved[:, :, None, None]).flatten(4).all(-1).all(1).flatten(1)
    assert (same.sum(1) == 1).all()
    assert len(same.long().argmax(1).unique()) > 25  # not one shift for all of them
    assert torch.equal(random_shift(images, 0), images)


def test_the_convolutions_move_with_the_image():
    """Their strides multiply to 8: an image moved by 8 pixels has its features one place further."""
    encoder = ImageEncoder((3, 96, 96), 20, (0, 1)).eval()
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = (encoder.convolutions(x) for x in (image, image.roll((8, 16), (2, 3))))
    assert here.shape == (1, 32, 8, 8)
    torch.testing.assert_close(there[:, :, 1:, 2:], here[:, :, :-1, :-2], rtol=1e-4, atol=1e-5)
    assert (there[:, :, 1:, 2:] - here[:, :, 1:, 2:]).abs().max() > 1e-3


def test_learns_where_the_bar_is_from_shifted_images():
    """The encoder trains on depth in metres, and the shifts leave enough to see."""

    def draw(count):
        place, columns = torch.rand(count), torch.arange(96.0)
        left = (8 + 70 * place)[:, None]
        images = torch.zeros(count, 2, 96, 96)
        images[:, :, 30:70] = 5.0 * ((columns >= left) & (columns < left + 8)).float()[:, None, None]
        return images, place

    torch.manual_seed(0)
    encoder = ImageEncoder((2, 96, 96), 16, (0.0, 20.0), num_channels=8)
    readout = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *readout.parameters()], lr=1e-3)
    for _ in range(200):
        images, place = draw(32)
        loss = F.mse_loss(readout(encoder(images)).squeeze(-1), place)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    images, place = draw(100)
    with torch.no_grad():
        error = F.mse_loss(readout(encoder(images)).squeeze(-1), place)
    assert error < 0.2 * place.var()


@pytest.mark.parametrize(
    ("image_shape", "value_range", "message"),
    [
        ((4,), (0, 1), r"\(C, H, W\) or \(H, W, C\), got the observation shape \(4,\)"),
        ((64, 48, 64), (0, 1), "cannot tell the channels"),
        ((3, 38, 96), (0, 1), "38 x 96 pixels are too small; the least is 39 x 39"),
        ((3, 96, 96), (1, 1), "low < high"),
    ],
)
def test_bad_shapes_are_refused(image_shape, value_range, message):
    with pytest.raises(UserError, match=message):
        ImageEncoder(image_shape, 10, value_range)


def test_what_is_no_image_is_refused():
    encoder = ImageEncoder((3, 39, 39), 10, (0, 1)).eval()
    assert encoder(torch.rand(2, 3, 39, 39)).shape == (2, 10)
    with pytest.raises(UserError, match=r"shape \(batch, \*\(3, 39, 39\)\), got \(2, 4\)"):
        encoder(torch.rand(2, 4))
    with pytest.raises(UserError, match=r"got \(2, 39, 39, 3\)"):
        encoder(torch.rand(2, 39, 39, 3))
    with pytest.raises(UserError, match=r"uint8 or floats, got torch\.int64"):
        encoder(torch.zeros(2, 3, 39, 39, dtype=torch.long))
