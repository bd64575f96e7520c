"""Where image files are decoded: on the spot if that is quicker than to send them elsewhere, else in a bounded pool."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from defense.model_config import InputConfig
from service.arrays import Pixels
from service.errors import TooLarge
from service.images import decode_image

# Such a file takes about 50 us, and the way to another thread and back as long; a hostile one, 1 ms at most.
SMALL_BYTES, SMALL_PIXELS = 4096, 64 * 64
_SIMPLE = (b"\x89PNG", b"\xff\xd8\xff")  # PNG, JPEG
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")  # of a PNG, which expand to a megabyte each


class NotOnTheSpot(Exception):
    """Something has to be waited for."""


class Decoder:
    """Decodes the files of a request, in order.

    Args:
        config: of the network's input. threads: that decode what is not small. max_pixels: of an image.
    """

    def __init__(self, config: InputConfig, *, threads: int, max_pixels: int) -> None:
        self._decode = partial(decode_image, config=config, max_pixels=max_pixels)
        self._decode_small = partial(decode_image, config=config, max_pixels=min(max_pixels, SMALL_PIXELS))
        self._pool = ThreadPoolExecutor(threads, "decode")

    async def decode(self, files: list[bytes]) -> list[Pixels]:
        """Pixels [H, W, C] of each file.

        Raises:
            BadImage, TooLarge, Unprocessable: a file is at fault.
        """
        if len(files) == 1:
            with suppress(NotOnTheSpot):
                return [self.on_the_spot(files[0])]
        loop = asyncio.get_running_loop()
        decoded = [loop.run_in_executor(self._pool, self._decode, file) for file in files]
        try:
            return await asyncio.gather(*decoded)
        finally:
            for pixels in decoded:  # where one is at fault, nobody will read the others, nor count what they hold
                pixels.cancel()

    def on_the_spot(self, file: bytes) -> Pixels:
        """``decode``, of a file that is quicker decoded than sent elsewhere.

        Raises:
            NotOnTheSpot: it is none. BadImage, Unprocessable: it is at fault.
        """
        if len(file) > SMALL_BYTES or not file.startswith(_SIMPLE) or any(c in file for c in _COMPRESSED_CHUNKS):
            raise NotOnTheSpot
        try:
            return self._decode_small(file)
        except TooLarge as error:  # small only as a file
            raise NotOnTheSpot from error

    def shutdown(self) -> None:
        """Drop what waits; what is being decoded ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
