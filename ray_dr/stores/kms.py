"""A wrapping key inside AWS KMS: it never leaves it, and every use of it is in KMS's own log.

Credentials come from where S3's come from; the region from the key's ARN, or else from AWS_DEFAULT_REGION or the profile.
AWS_ENDPOINT_URL_KMS names another server than AWS. Needed are `kms:Encrypt` (to make a store or rotate to this key) and
`kms:Decrypt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_dr.errors import AccessDenied, StoreError, StoreUnavailable
from ray_dr.stores.keys import ID_BYTES, WrongKey, derive

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0
TRIES = 4

_CREDENTIALS = {
    "UnrecognizedClientException", "InvalidClientTokenId", "ExpiredTokenException", "IncompleteSignature",
    "MissingAuthenticationTokenException", "InvalidSignatureException", "SignatureDoesNotMatch", "OptInRequired",
}  # fmt: skip
_DENIED = {"AccessDeniedException", "AccessDenied", "NotAuthorizedException"}
_BUSY = {"ThrottlingException", "LimitExceededException", "DependencyTimeoutException", "KMSInternalException",
         "KeyUnavailableException", "ServiceUnavailableException", "InternalFailure"}  # fmt: skip
_WHY = {
    "DisabledException": "it is disabled: enable it",
    "KMSInvalidStateException": "it is disabled or about to be deleted: enable it or cancel its deletion",
    "NotFoundException": "there is none of that name in {region}: check name and region (AWS_DEFAULT_REGION, or give the ARN)",
    "IncorrectKeyException": "the store's data key was wrapped with another one: has the alias been moved? give that one",
    "InvalidCiphertextException": "the store's wrapped data key was changed, or is of another store: restore it from a copy",
    "InvalidKeyUsageException": "it is not made for encryption: use a symmetric key",
    "ValidationException": "that is no name of a key: give its id, its ARN or alias/NAME",
}


class KmsKey:
    """The key `name` (id, ARN or alias/NAME), known by just this name. Raises AccessDenied, WrongKey, StoreUnavailable."""

    note = "; a KMS key is known by the name it was first given: its id, its ARN and an alias count as different"

    def __init__(self, name: str) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": TRIES, "mode": "standard"},
        )
        self._name = name
        self.fingerprint = derive(name.encode(), b"", b"ray_dr kms", ID_BYTES).hex()
        try:
            session = boto3.session.Session()
            is_arn = name.startswith("arn:") and name.count(":") >= 5
            self._region = name.split(":")[3] if is_arn else session.region_name
            self._client = session.client("kms", region_name=self._region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise WrongKey(f"KMS cannot be asked for key {name}: {error} (set AWS_DEFAULT_REGION, or give the ARN)") from error

    def wrap(self, secret: bytes, context: str) -> bytes:
        answer = self._call("encrypt", Plaintext=secret, EncryptionContext={"ray_dr": context})
        return bytes(answer["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        answer = self._call("decrypt", CiphertextBlob=wrapped, EncryptionContext={"ray_dr": context})
        return bytes(answer["Plaintext"])

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        from botocore import exceptions

        try:
            answer: dict[str, Any] = getattr(self._client, operation)(KeyId=self._name, **arguments)
        except exceptions.ClientError as error:
            raise self._refusal(operation, error.response) from error
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.TokenRetrievalError) as error:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role"
            raise AccessDenied(f"no usable credentials for KMS, which holds the store's key {self._name} ({remedy})") from error
        except exceptions.ParamValidationError as error:
            raise WrongKey(f"KMS has no key {self._name!r}: {_WHY['ValidationException']}") from error
        except exceptions.BotoCoreError as error:
            raise StoreUnavailable(f"KMS, which holds the store's key {self._name}, does not answer ({error})") from error
        return answer

    def _refusal(self, operation: str, answer: Mapping[str, Any]) -> StoreError:
        """The error that an error answer of KMS stands for."""
        code = str(answer.get("Error", {}).get("Code", ""))
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said = f"{status} {code}: {answer.get('Error', {}).get('Message', '')}".strip(": ")
        what = f"KMS refuses to {operation} with key {self._name}"
        if code in _WHY:
            return WrongKey(f"{what}: {_WHY[code].format(region=self._region)} ({said})")
        if code in _CREDENTIALS:
            return AccessDenied(f"{what}: check the credentials, their expiry and this machine's clock ({said})")
        if code in _DENIED or status in (401, 403):
            need = f"kms:{operation.capitalize()}"
            return AccessDenied(f"{what}: allow {need} in the role's and the key's policy, and see that it is the key ({said})")
        if code in _BUSY or status >= 500 or status == 429:
            return StoreUnavailable(f"{what}: it is busy or failing ({said})")
        return WrongKey(f"{what} ({said})")
