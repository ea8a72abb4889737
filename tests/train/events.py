# SPDX-License-Identifier: Apache-2.0
"""What a run's TensorBoard files say."""


def read(directory):
    """Every (tag, step, value) in the order written, over all event files of a run."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found
