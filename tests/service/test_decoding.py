"""Where files are decoded: what a request leaves behind in the pool."""

import asyncio
import threading

import pytest

from defense.model_config import InputConfig
from service.decoding import Decoder
from service.errors import BadImage

FAULTY = b"not an image"


@pytest.mark.parametrize("faulty_at", [0, 3])
def test_what_a_refused_request_has_left_in_the_pool_is_not_decoded(faulty_at):
    seen, refused = [], threading.Event()

    def decode(file):
        if FAULTY in seen:
            assert refused.wait(20)
        seen.append(file)
        if file == FAULTY:
            raise BadImage("not an image")
        return file

    async def scenario():
        decoder = Decoder(InputConfig(size=(8, 8), channels=3), threads=1, max_pixels=100)
        decoder._decode = decode
        files = [b"%d" % i for i in range(100)]
        files[faulty_at] = FAULTY
        with pytest.raises(BadImage):
            await decoder.decode(files)
        await asyncio.sleep(0)  # the loop tells the pool in its next turn
        refused.set()
        decoder._pool.shutdown(wait=True)  # after all that is still to be done

    asyncio.run(scenario())
    # The next one may have been begun when the request was refused, and no other after it.
    assert len(seen) in (faulty_at + 1, faulty_at + 2)
