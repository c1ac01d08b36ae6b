"""Tests of the digits example, through its processes as a scheduler would start them: python3 -m unittest -v test_digits

Owns no helper of the example itself; the standard library alone.
"""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import train  # noqa: E402  (it lies beside this file, wherever the tests are started)

IMAGES = 1797
TEST_ROWS = set(range(4, IMAGES, 5))
QUICK = ["--min-seconds", "0", "--epochs", "3"]
PATIENCE = 60  # seconds for a run of this size on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**changes):
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ARES_", "MASTER_")) and name not in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    }
    keep.update(changes)
    return keep


class Process:
    """One rank; its output goes to a file, so that nobody has to drain it while it runs."""

    def __init__(self, rank, world_size, port, arguments, **changes):
        self.output = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train.py")] + arguments,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **changes
            ),
        )

    def text(self):
        self.output.flush()
        descriptor = self.output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def wait(self, seconds=PATIENCE):
        return self.child.wait(timeout=seconds)

    def wait_for(self, text, seconds=PATIENCE):
        deadline = time.monotonic() + seconds
        while text not in self.text():
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {text!r} in the rank's output:\n{self.text()}")
            time.sleep(0.05)

    def losses(self):
        return [float(loss) for loss in re.findall(r"^epoch \d+ loss (\S+)", self.text(), re.M)]

    def result(self):
        return json.loads(self.text().splitlines()[-1][len("RESULT ") :])

    def end(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.output.close()


class DigitsTest(unittest.TestCase):
    def start(self, *arguments, **changes):
        process = Process(*arguments, **changes)
        self.addCleanup(process.end)
        return process

    def start_all(self, world_size, arguments):
        port = free_port()
        return [self.start(rank, world_size, port, arguments) for rank in range(world_size)]

    def finish(self, processes):
        for process in processes:
            self.assertEqual(process.wait(), 0, process.text())
        return processes

    def changed_data(self, change):
        """A copy of the images; `change(row, line)` gives the line to write."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "images.csv.gz")
        with gzip.open(train.DATA, "rt") as lines, gzip.open(path, "wt") as copy:
            for row, line in enumerate(lines):
                copy.write(change(row, line.rstrip("\n")) + "\n")
        return path


class Training(DigitsTest):
    def test_the_loss_curve_is_the_same_for_1_2_and_4_ranks(self):
        runs = {size: self.finish(self.start_all(size, QUICK)) for size in (1, 2, 4)}
        alone = runs[1][0].losses()
        self.assertEqual(len(alone), 3)
        self.assertLess(alone[-1], alone[0] / 2)
        for processes in runs.values():
            for process in processes:
                self.assertEqual(len(process.losses()), 3)
                for mine, expected in zip(process.losses(), alone):
                    self.assertAlmostEqual(mine, expected, delta=1e-6)
            sizes = [int(re.search(r"^shard (\d+) of 1438 ", process.text(), re.M).group(1)) for process in processes]
            self.assertEqual(sum(sizes), IMAGES - len(TEST_ROWS))
            self.assertLessEqual(max(sizes) - min(sizes), 1)
            self.assertEqual(processes[0].result()["accuracy"], runs[1][0].result()["accuracy"])

    def test_the_default_settings_reach_95_percent(self):
        (process,) = self.finish(self.start_all(1, ["--min-seconds", "0"]))
        self.assertGreaterEqual(process.result()["accuracy"], 0.95)

    def test_test_images_change_nothing_in_the_training(self):
        def next_digit(row, line):
            pixels, label = line.rsplit(",", 1)
            return f"{pixels},{(int(label) + 1) % 10}" if row in TEST_ROWS else line

        (honest,) = self.finish(self.start_all(1, QUICK))
        (misled,) = self.finish(self.start_all(1, QUICK + ["--data", self.changed_data(next_digit)]))
        self.assertEqual(misled.losses(), honest.losses())
        self.assertLess(misled.result()["accuracy"], 0.1)

    def test_min_seconds_spreads_the_epochs(self):
        began = time.monotonic()
        self.finish(self.start_all(2, ["--min-seconds", "4", "--epochs", "2"]))
        self.assertGreaterEqual(time.monotonic() - began, 4)

    def test_the_result_names_attempt_and_token(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "result.json")
            names = {"ARES_RESULT_FILE": path, "ARES_ATTEMPT": "2", "ARES_FENCING_TOKEN": "18446744073709551615"}
            gpus = "GPU-1,GPU-2"
            process = self.start(0, 1, free_port(), QUICK, CUDA_VISIBLE_DEVICES=gpus, **names)
            self.finish([process])
            with open(path) as file:
                result = json.load(file)
            self.assertEqual(os.listdir(folder), ["result.json"])
        self.assertEqual(result, process.result())
        self.assertEqual(sorted(result), ["accuracy", "attempt", "loss", "token", "world_size"])
        self.assertEqual((result["attempt"], result["token"], result["world_size"]), (2, 18446744073709551615, 1))
        self.assertAlmostEqual(result["loss"], process.losses()[-1], delta=1e-8)
        self.assertIn("GPUs: " + gpus, process.text())


class Shards(DigitsTest):
    def test_shards_share_out_the_training_images_and_no_test_image(self):
        # The row's number takes the place of the first two pixels, which shows where an image came from.
        marked = self.changed_data(lambda row, line: f"{row // 100},{row % 100},{line.split(',', 2)[2]}")
        for size in (1, 2, 3, 4):
            trained, tested = [], []
            for rank in range(size):
                shard = train.read_shard(marked, rank, size)
                trained += [origin(pixels) for pixels, _ in shard.train.values()]
                tested += [origin(pixels) for pixels, _ in shard.test]
            self.assertEqual(sorted(trained), [row for row in range(IMAGES) if row not in TEST_ROWS])
            self.assertEqual(sorted(tested), sorted(TEST_ROWS))

    def test_a_rank_parses_no_line_of_another_rank(self):
        training_rows = [row for row in range(IMAGES) if row not in TEST_ROWS]
        mine = set(training_rows[1::4]) | set(sorted(TEST_ROWS)[1::4])
        censored = self.changed_data(lambda row, line: line if row in mine else "not yours")
        whole, seen = train.read_shard(train.DATA, 1, 4), train.read_shard(censored, 1, 4)
        self.assertEqual((seen.train, seen.test), (whole.train, whole.test))
        with self.assertRaisesRegex(train.Failure, "line 1: not 64 pixels and a digit"):
            train.read_shard(censored, 0, 4)


def origin(pixels):
    return round(pixels[0] * train.BRIGHTEST) * 100 + round(pixels[1] * train.BRIGHTEST)


class Peers(DigitsTest):
    def test_a_killed_rank_ends_the_others(self):
        processes = self.start_all(4, ["--min-seconds", "60"])
        for process in processes:
            process.wait_for("epoch 1 loss")
        processes.pop(2).child.kill()
        self.expect_failures(processes, "lost rank 2 at 127.0.0.1:")

    def test_a_silent_rank_ends_the_others(self):
        processes = self.start_all(3, ["--min-seconds", "60", "--peer-timeout", "4"])
        for process in processes:
            process.wait_for("epoch 1 loss")
        os.kill(processes.pop(1).child.pid, signal.SIGSTOP)  # the cleanup's SIGKILL ends it
        self.expect_failures(processes, "lost rank 1 at 127.0.0.1:")

    def expect_failures(self, processes, expected):
        deadline = time.monotonic() + 10
        for process in processes:
            self.assertEqual(process.wait(max(0.1, deadline - time.monotonic())), 1, process.text())
            self.assertRegex(process.text(), "rank .: lost rank . at 127.0.0.1:")
        self.assertIn(expected, "".join(process.text() for process in processes))

    def test_rank_0_may_start_last(self):
        port = free_port()
        processes = [self.start(1, 2, port, QUICK)]
        time.sleep(2)
        processes.append(self.start(0, 2, port, QUICK))
        self.finish(processes)

    def test_missing_ranks_are_named(self):
        short = ["--start-timeout", "3"]
        port = free_port()
        first, second = self.start(0, 4, port, short), self.start(2, 4, port, short)
        self.assertEqual((first.wait(), second.wait()), (1, 1))
        self.assertIn(f"rank 0: rendezvous at 127.0.0.1:{port}: still missing when time was up: rank 1, 3", first.text())
        lonely = self.start(1, 2, free_port(), ["--start-timeout", "1"])
        self.assertEqual(lonely.wait(), 1)
        self.assertIn("rank 1: can't reach rank 0 (rendezvous) at 127.0.0.1:", lonely.text())

    def test_strangers_and_ranks_of_an_older_attempt_are_refused(self):
        port = free_port()
        first = self.start(0, 2, port, QUICK, ARES_FENCING_TOKEN="8")
        stale = self.start(1, 2, port, QUICK, ARES_FENCING_TOKEN="7")
        self.assertEqual(stale.wait(), 1)
        self.assertIn("refused this rank: it belongs to another run", stale.text())
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        self.finish([self.start(1, 2, port, QUICK, ARES_FENCING_TOKEN="8"), first])
        self.assertEqual(first.result()["token"], 8)

    def test_a_wrong_environment_is_refused_by_name(self):
        for changes, expected in (
            ((4, 4, 29500), "RANK=4: must be a whole number from 0 to 3"),
            ((0, "two", 29500), "WORLD_SIZE=two: must be"),
            ((0, 1, 70000), "MASTER_PORT=70000: must be"),
        ):
            process = self.start(*changes, QUICK)
            self.assertEqual(process.wait(), 1)
            self.assertIn(expected, process.text())


if __name__ == "__main__":
    unittest.main()
