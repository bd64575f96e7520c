"""The importance store that the settings name."""

from defense import read_config
from importance_store import ConnectedStore, open_store
from service.settings import Settings


def store_of(settings: Settings) -> ConnectedStore:
    """The store of the settings' model, to be closed.

    Raises:
        StoreError: it cannot be reached, or refuses us. ModelDirectoryError: there is no such model.
    """
    url = settings.redis_url.get_secret_value() if settings.redis_url else None
    name = read_config(settings.model).name
    return open_store(redis_url=url, data_dir=settings.data_dir, model=name, history=settings.history)
