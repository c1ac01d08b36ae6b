#!/usr/bin/env python3
"""Train a small classifier of handwritten digits, data-parallel over WORLD_SIZE ranks. Python 3.8, standard library alone.

Owns the data's split, the model, the training loop and the result. Leaves the ranks' meeting and the all-reduce to ring.py.

Every rank holds the whole model and its own share of the training images. A step computes the gradient's sum over the rank's
images of the batch, adds up these sums over all ranks, and divides by the batch's size. Batches are drawn by the seed from all
training images, whoever holds them, so the model is the same (but for rounding) however many ranks there are.
"""

import argparse
import gzip
import json
import math
import os
import random
import socket
import sys
import time
from operator import mul

import ring

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "digits.csv.gz")
PIXELS = 64
BRIGHTEST = 16
CLASSES = 10
HIDDEN = 32
TEST_EVERY = 5  # the last image of each five is for the test alone
MOMENTUM = 0.9


class Failure(Exception):
    """What ends this rank, in words for the person who reads its log."""


class Shard:
    """What one rank holds. `train`: position among all training images -> (pixels, label). `test`: a list of the same."""

    def __init__(self):
        self.train = {}
        self.test = []
        self.train_total = 0
        self.test_total = 0


def read_shard(path, rank, world_size):
    """Read this rank's share: of the training and of the test images, each `world_size`-th, beginning with the `rank`-th.

    The file is compressed as a whole, so other ranks' lines pass by; they are neither parsed nor kept.
    """
    shard = Shard()
    with gzip.open(path, "rt", encoding="ascii") as lines:
        for row, line in enumerate(lines):
            if row % TEST_EVERY == TEST_EVERY - 1:
                if shard.test_total % world_size == rank:
                    shard.test.append(parse_image(line, row, path))
                shard.test_total += 1
            else:
                if shard.train_total % world_size == rank:
                    shard.train[shard.train_total] = parse_image(line, row, path)
                shard.train_total += 1
    if not shard.train_total or not shard.test_total:
        raise Failure(f"{path}: no training or no test images in it")
    return shard


def parse_image(line, row, path):
    """(pixels from 0 to 1 and a constant 1 for the bias, label)."""
    try:
        *pixels, label = [int(float(field)) for field in line.split(",")]
    except ValueError:
        pixels, label = [], -1
    if len(pixels) != PIXELS or not 0 <= label < CLASSES:
        raise Failure(f"{path}, line {row + 1}: not {PIXELS} pixels and a digit")
    return [pixel / BRIGHTEST for pixel in pixels] + [1.0], label


class Model:
    """Pixels -> 32 tanh units -> softmax over the digits. A layer is a list of rows, one a unit: its weights, then its bias."""

    def __init__(self, generator):
        self.hidden = [new_unit(PIXELS, generator) for _ in range(HIDDEN)]
        self.output = [new_unit(HIDDEN, generator) for _ in range(CLASSES)]
        self.velocity = [0.0] * sum(len(unit) for unit in self.hidden + self.output)

    def forward(self, pixels):
        """(activations of the hidden units and a constant 1, probability of each digit)."""
        hidden = [math.tanh(sum(map(mul, unit, pixels))) for unit in self.hidden]
        hidden.append(1.0)
        scores = [sum(map(mul, unit, hidden)) for unit in self.output]
        highest = max(scores)
        powers = [math.exp(score - highest) for score in scores]
        total = sum(powers)
        return hidden, [power / total for power in powers]

    def gradient(self, images):
        """(gradient of the summed loss as one flat list, summed cross-entropy loss) over these images, which may be none."""
        if not images:
            return [0.0] * len(self.velocity), 0.0
        loss = 0.0
        activations, hidden_errors, output_errors = [], [], []
        for pixels, label in images:
            hidden, probabilities = self.forward(pixels)
            loss -= math.log(max(probabilities[label], sys.float_info.min))
            probabilities[label] -= 1.0  # now the error of each score
            back = [sum(map(mul, weights, probabilities)) for weights in zip(*self.output)]
            activations.append(hidden)
            output_errors.append(probabilities)
            hidden_errors.append([error * (1.0 - h * h) for error, h in zip(back, hidden[:-1])])
        flat = outer_sum(hidden_errors, [pixels for pixels, _ in images])
        flat += outer_sum(output_errors, activations)
        return flat, loss

    def step(self, gradient, learning_rate):
        """Gradient descent with momentum. `gradient`: flat, the mean over the batch."""
        self.velocity = [MOMENTUM * v - learning_rate * g for v, g in zip(self.velocity, gradient)]
        moves = iter(self.velocity)
        for layer in (self.hidden, self.output):
            for unit in layer:
                unit[:] = [weight + next(moves) for weight in unit]

    def correct(self, images):
        """How many of these images get their label."""
        hits = 0
        for pixels, label in images:
            probabilities = self.forward(pixels)[1]
            hits += probabilities.index(max(probabilities)) == label
        return hits


def new_unit(inputs, generator):
    reach = 1.0 / math.sqrt(inputs)
    return [generator.uniform(-reach, reach) for _ in range(inputs)] + [0.0]


def outer_sum(errors, inputs):
    """The sum over the images of errors x inputs, flat, one row of the layer after the other."""
    columns = list(zip(*inputs))
    return [sum(map(mul, unit_errors, column)) for unit_errors in zip(*errors) for column in columns]


def train(peers, shard, options):
    """Train for `options.epochs`; (model, mean loss of the last epoch)."""
    generator = random.Random(options.seed)
    model = Model(generator)
    order = list(range(shard.train_total))
    began = time.monotonic()
    for epoch in range(1, options.epochs + 1):
        generator.shuffle(order)
        loss = train_epoch(peers, model, shard, order, options)
        # Pacing: the epoch's part of the shortest duration must be over before the next one begins.
        peers.sleep(began + options.min_seconds * epoch / options.epochs - time.monotonic())
        say(f"epoch {epoch} loss {loss:.8f} ({epoch}/{options.epochs}, {time.monotonic() - began:.1f} s)")
    return model, loss


def train_epoch(peers, model, shard, order, options):
    """One pass over all training images; the mean loss over them, each as it was when its batch began."""
    loss = 0.0
    for begin in range(0, len(order), options.batch_size):
        batch = order[begin : begin + options.batch_size]
        gradient, batch_loss = model.gradient([shard.train[image] for image in batch if image in shard.train])
        *gradient, batch_loss = peers.all_reduce(gradient + [batch_loss])
        model.step([g / len(batch) for g in gradient], options.learning_rate)
        loss += batch_loss
    return loss / len(order)


def run(options, rank, world_size, master):
    """This rank's whole life."""
    shard = read_shard(options.data, rank, world_size)
    say(f"rank {rank} of {world_size} on {socket.gethostname()}, GPUs: {visible_gpus()}")
    say(f"shard {len(shard.train)} of {shard.train_total} training images")
    identity = run_identity(options, world_size)
    peers = ring.join(rank, world_size, master, identity, options.start_timeout, options.peer_timeout)
    try:
        model, loss = train(peers, shard, options)
        (correct,) = peers.all_reduce([float(model.correct(shard.test))])
    finally:
        peers.close()
    if rank == 0:
        accuracy = correct / shard.test_total
        say(f"test accuracy {100 * accuracy:.2f} % ({int(correct)} of {shard.test_total} images)")
        publish(accuracy, loss, world_size)


def run_identity(options, world_size):
    """What all ranks of a run have in common; the fencing token tells one attempt from another."""
    return {
        "world_size": world_size,
        "token": os.environ.get("ARES_FENCING_TOKEN"),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "min_seconds": options.min_seconds,
    }


def publish(accuracy, loss, world_size):
    """Write the result to ARES_RESULT_FILE, if it is set, and print it as the last line."""
    result = {
        "accuracy": accuracy,
        "loss": loss,
        "world_size": world_size,
        "attempt": number_or_text(os.environ.get("ARES_ATTEMPT")),
        "token": number_or_text(os.environ.get("ARES_FENCING_TOKEN")),
    }
    text = json.dumps(result)
    path = os.environ.get("ARES_RESULT_FILE")
    if path:
        partial = path + ".partial"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(partial, path)  # a reader finds the whole result or none
        except OSError as error:
            raise Failure(f"can't write the result to ARES_RESULT_FILE={path}: {error}") from error
    say("RESULT " + text)


def number_or_text(value):
    return int(value) if value is not None and value.isdigit() else value


def visible_gpus():
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None:
        return "not assigned (CUDA_VISIBLE_DEVICES isn't set)"
    return gpus or "none"


def say(line):
    print(line, flush=True)


def environment_number(name, default, least, most):
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise Failure(f"{name}={text}: must be a whole number from {least} to {most}")
    return value


def number(kind, least):
    """A parser for argparse: a number of this kind that is at least `least`."""

    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be {least:g} or more")
        return value

    parse.__name__ = "number"  # argparse shows it when `kind` refuses the text
    return parse


def parse_options(arguments):
    parser = argparse.ArgumentParser(
        description="Train a classifier of handwritten digits over WORLD_SIZE ranks. Reads RANK, WORLD_SIZE, MASTER_ADDR and "
        "MASTER_PORT (without them: one process); all ranks need the same options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default=DATA, help="images, one a line: 64 pixels and the digit, gzipped CSV")
    parser.add_argument("--epochs", type=number(int, 1), default=30, help="passes over the training images")
    parser.add_argument("--batch-size", type=number(int, 1), default=96, help="images of a step, over all ranks")
    parser.add_argument("--learning-rate", type=number(float, 0), default=0.1, help="of the gradient descent")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="of the first weights and of the batches")
    parser.add_argument(
        "--min-seconds",
        type=number(float, 0),
        default=15.0,
        help="spread the epochs over at least this time, by sleeping at the end of those that were faster: "
        "the model is small, and a job that is over at once shows little. It changes no result",
    )
    parser.add_argument("--start-timeout", type=number(float, 0), default=60.0, help="seconds until all ranks must have met")
    parser.add_argument(
        "--peer-timeout", type=number(float, 0), default=8.0, help="seconds without progress until a rank counts as lost"
    )
    return parser.parse_args(arguments)


def main(arguments):
    options = parse_options(arguments)
    rank = "?"
    try:
        world_size = environment_number("WORLD_SIZE", 1, 1, 1024)
        rank = environment_number("RANK", 0, 0, world_size - 1)
        master = (os.environ.get("MASTER_ADDR", "127.0.0.1"), environment_number("MASTER_PORT", 29500, 1, 65535))
        run(options, rank, world_size, master)
    except (Failure, ring.PeerError, OSError) as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
