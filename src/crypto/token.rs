//! Keys in PKCS#11 tokens (smart cards, security modules, SoftHSM): the token wraps and unwraps, its key never leaves it.
//!
//! Each module, a library of the token's maker, is loaded once per process and has one thread that alone calls it: what is asked of it
//! comes one after the other, whatever it says of threads, and a token that hangs holds up that thread and nobody for longer than
//! [`PATIENCE`]. Each question has a session of its own, so that a token that was pulled and put back needs nothing special.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::key_file::digest;
use super::profile::Token;
use super::{CryptoError, Fingerprint, TAG_BYTES, random};

/// A token that gives no answer for so long is given up; smart cards need seconds, keypads a person.
const PATIENCE: Duration = Duration::from_secs(60);
const NONCE_BYTES: usize = 12;
/// Of an AES-256 key.
const KEY_BYTES: u64 = 32;
/// Enciphered with a key it tells keys apart.
const ID_BLOCK: &[u8; 16] = b"keepd/1 token id";

type Result<T, E = CryptoError> = std::result::Result<T, E>;

/// An AES-256 key in a token.
pub struct TokenKey {
    place: Place,
    /// Asked once.
    fingerprint: OnceLock<Fingerprint>,
}

/// Where a key is, and what opens its token.
#[derive(Clone)]
struct Place {
    module: PathBuf,
    /// Label or serial number.
    token: String,
    key: String,
    pin: Option<Zeroizing<String>>,
}

impl TokenKey {
    /// Nothing is asked of the token yet. `token` is its label or serial number, `key` the label of the key; without a PIN the token has to
    /// do without or ask for it on a keypad of its own.
    pub fn new(module: &Path, token: &str, key: &str, pin: Option<Zeroizing<String>>) -> Self {
        let place = Place { module: module.to_owned(), token: token.to_owned(), key: key.to_owned(), pin };
        Self { place, fingerprint: OnceLock::new() }
    }

    /// Runs something with the key, on the module's own thread.
    fn ask<T: Send + 'static>(&self, what: impl FnOnce(&Session, ObjectHandle) -> Result<T> + Send + 'static) -> Result<T> {
        let place = self.place.clone();
        // One library, whatever it is called.
        let module = std::fs::canonicalize(&self.place.module).unwrap_or_else(|_| self.place.module.clone());
        on_thread_of(&module, PATIENCE, move |module| {
            let (session, key) = place.open(module)?;
            what(&session, key)
        })
    }
}

impl Token for TokenKey {
    fn fingerprint(&self) -> Result<Fingerprint> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(*known);
        }
        let block = self.ask(|session, key| session.encrypt(&Mechanism::AesEcb, key, ID_BLOCK).map_err(|e| refused("encipher", &e)))?;
        if block.len() != ID_BLOCK.len() {
            return Err(CryptoError::Token("what it enciphers is longer than it should be; the module does not know CKM_AES_ECB".into()));
        }
        let found = Fingerprint(digest("keepd/1 token fingerprint", &block));
        Ok(*self.fingerprint.get_or_init(|| found))
    }

    fn wrap(&self, keys: &[u8], associated: &[u8]) -> Result<Vec<u8>> {
        let (keys, associated, nonce) = (Zeroizing::new(keys.to_vec()), associated.to_vec(), random::<NONCE_BYTES>()?);
        self.ask(move |session, key| {
            let mut iv = nonce;
            let sealed = gcm(&mut iv, &associated, |gcm| session.encrypt(gcm, key, &keys)).map_err(|e| refused("wrap", &e))?;
            // Some modules choose a nonce of their own, or put something around: nothing is kept that does not open as it is written down.
            let mut iv = nonce;
            let opened = gcm(&mut iv, &associated, |gcm| session.decrypt(gcm, key, &sealed)).map(Zeroizing::new);
            match opened {
                Ok(opened) if *opened == *keys && sealed.len() == keys.len() + TAG_BYTES => Ok([&nonce[..], &sealed].concat()),
                Ok(_) => Err(CryptoError::Token("what it wrapped does not open as CKM_AES_GCM with the nonce it was given".into())),
                Err(e) => Err(refused("open what it just wrapped", &e)),
            }
        })
    }

    fn unwrap(&self, wrapped: &[u8], associated: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_BYTES>().ok_or(CryptoError::Short)?;
        let (mut nonce, sealed, associated) = (*nonce, sealed.to_vec(), associated.to_vec());
        if sealed.len() <= TAG_BYTES {
            return Err(CryptoError::Short);
        }
        self.ask(move |session, key| {
            let opened = gcm(&mut nonce, &associated, |gcm| session.decrypt(gcm, key, &sealed));
            opened.map(Zeroizing::new).map_err(|e| match &e {
                // SoftHSM says of a wrong tag that something general is wrong.
                Error::Pkcs11(
                    RvError::EncryptedDataInvalid | RvError::EncryptedDataLenRange | RvError::DataInvalid | RvError::GeneralError,
                    _,
                ) => CryptoError::Open,
                _ => refused("unwrap", &e),
            })
        })
    }
}

fn gcm<T>(nonce: &mut [u8], associated: &[u8], run: impl FnOnce(&Mechanism<'_>) -> Result<T, Error>) -> Result<T, Error> {
    run(&Mechanism::AesGcm(GcmParams::new(nonce, associated, ((TAG_BYTES * 8) as u64).into())?))
}

impl Place {
    /// A session in which the key may be used.
    fn open(&self, module: &mut Module) -> Result<(Session, ObjectHandle)> {
        let (slot, info) = match self.find_token(module.context()?) {
            // Many modules look for tokens once, when they are loaded.
            Err(_) => {
                module.forget();
                self.find_token(module.context()?)?
            }
            found => found?,
        };
        let session = module.context()?.open_ro_session(slot).map_err(|e| self.error(&e))?;
        self.log_in(&session, &info)?;
        let key = self.find_key(&session)?;
        Ok((session, key))
    }

    fn find_token(&self, context: &Pkcs11) -> Result<(Slot, TokenInfo)> {
        let module = self.module.display();
        let slots = context.get_slots_with_token().map_err(|e| self.error(&e))?;
        // One that cannot be asked is not the one.
        let tokens = slots.into_iter().filter_map(|slot| Some((slot, context.get_token_info(slot).ok()?)));
        let tokens: Vec<_> = tokens.filter(|(_, info)| info.token_initialized()).collect();
        let labels: Vec<String> = tokens.iter().map(|(_, t)| format!("'{}'", shown(t.label()))).collect();
        let mut found: Vec<_> = tokens.iter().filter(|(_, t)| t.label() == self.token).collect();
        if found.is_empty() {
            found = tokens.iter().filter(|(_, t)| t.serial_number() == self.token).collect();
        }
        match found.as_slice() {
            [(slot, info)] => Ok((*slot, info.clone())),
            [] => Err(CryptoError::Token(format!(
                "{module} knows no token '{}' ({}); is it plugged in?",
                self.token,
                if labels.is_empty() { "it sees none at all".to_owned() } else { format!("it sees {}", labels.join(", ")) }
            ))),
            several => Err(CryptoError::Token(format!(
                "{} tokens have the label '{}'; name the right one by its serial number: {}",
                several.len(),
                self.token,
                several.iter().map(|(_, t)| shown(t.serial_number())).collect::<Vec<_>>().join(" or ")
            ))),
        }
    }

    fn log_in(&self, session: &Session, info: &TokenInfo) -> Result<()> {
        let error = |text: &str| Err(CryptoError::Token(format!("token '{}': {text}", self.token)));
        if !info.login_required() {
            return Ok(());
        }
        if info.user_pin_locked() {
            return error("its PIN is locked, for a wrong one was given too often; unlock it with the security officer's PIN");
        }
        if self.pin.is_none() && !info.protected_authentication_path() {
            return error("it wants a PIN, and none is configured (pin = { file = … })");
        }
        let refused = self.refusal(info);
        if let Some(refused) = refused {
            if refused_pins().contains(&refused) {
                return error(
                    "its PIN was refused before and is not tried again, so that it does not get locked; mend it and restart keepd",
                );
            }
            if info.user_pin_final_try() {
                return error("only one try of its PIN is left, which keepd does not use up; log in once by hand with the right one");
            }
        }
        let pin = self.pin.as_ref().map(|pin| AuthPin::from(pin.as_str()));
        match session.login(UserType::User, pin.as_ref()) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(Error::Pkcs11(RvError::PinIncorrect | RvError::PinLenRange | RvError::PinInvalid, _)) => {
                refused_pins().extend(refused);
                error("its PIN is wrong; it is not tried again before keepd is restarted, so that it does not get locked")
            }
            Err(Error::Pkcs11(RvError::PinLocked, _)) => {
                error("its PIN is locked, for a wrong one was given too often; unlock it with the security officer's PIN")
            }
            Err(Error::Pkcs11(RvError::PinExpired, _)) => error("its PIN has expired; give it a new one"),
            Err(Error::Pkcs11(RvError::UserPinNotInitialized, _)) => error("no PIN was ever set for its user"),
            Err(e) => Err(self.error(&e)),
        }
    }

    /// Tells a PIN and a token from others, without telling either.
    fn refusal(&self, info: &TokenInfo) -> Option<[u8; 32]> {
        let pin = self.pin.as_ref()?;
        let mut hash = Sha256::new();
        for part in [self.module.as_os_str().as_encoded_bytes(), info.serial_number().as_bytes(), pin.as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Some(hash.finalize().into())
    }

    fn find_key(&self, session: &Session) -> Result<ObjectHandle> {
        let place = format!("key '{}' in token '{}'", self.key, self.token);
        let error = |text: &str| Err(CryptoError::Token(format!("{place}: {text}")));
        let template = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Label(self.key.as_bytes().to_vec())];
        let found = session.find_objects(&template).map_err(|e| self.error(&e))?;
        let mut fitting = Vec::new();
        for key in &found {
            let attributes = [AttributeType::KeyType, AttributeType::ValueLen, AttributeType::Extractable];
            let attributes = session.get_attributes(*key, &attributes).map_err(|e| self.error(&e))?;
            let is_aes = attributes.contains(&Attribute::KeyType(KeyType::AES));
            let is_long = attributes.iter().any(|a| matches!(a, Attribute::ValueLen(len) if u64::from(*len) == KEY_BYTES));
            if is_aes && is_long {
                fitting.push((*key, attributes.contains(&Attribute::Extractable(true))));
            }
        }
        match (fitting.as_slice(), found.len()) {
            ([(key, extractable)], _) => {
                if *extractable {
                    tracing::warn!("{place} may be taken out of it (CKA_EXTRACTABLE); one that may not is safer");
                }
                Ok(*key)
            }
            ([], 0) => error("there is no such secret key; if it was deleted, other keys of the repositories have to open them"),
            ([], _) => error("it is no AES key of 256 bits"),
            (several, _) => error(&format!("{} keys have this label; give each a label of its own", several.len())),
        }
    }

    fn error(&self, error: &Error) -> CryptoError {
        CryptoError::Token(format!("token '{}' of {}: {}", self.token, self.module.display(), explain(error)))
    }
}

fn refused(what: &str, error: &Error) -> CryptoError {
    CryptoError::Token(match error {
        Error::Pkcs11(RvError::KeyFunctionNotPermitted, _) => format!("its key may not {what}; make one with CKA_ENCRYPT and CKA_DECRYPT"),
        Error::Pkcs11(RvError::MechanismInvalid | RvError::MechanismParamInvalid, _) => {
            format!("it cannot {what} in the way keepd needs (CKM_AES_GCM with 96 bits of nonce, CKM_AES_ECB)")
        }
        _ => format!("it did not {what}: {}", explain(error)),
    })
}

/// What went wrong, without the specification's long explanations.
fn explain(error: &Error) -> String {
    match error {
        Error::Pkcs11(RvError::TokenNotPresent | RvError::DeviceRemoved | RvError::SlotIdInvalid, _) => "it was taken out".into(),
        Error::Pkcs11(RvError::DeviceError, _) => "the device reports a fault".into(),
        Error::Pkcs11(RvError::DeviceMemory | RvError::HostMemory, _) => "it ran out of memory".into(),
        Error::Pkcs11(code, function) => format!("C_{function} says {code:?}"),
        other => other.to_string(),
    }
}

/// What a token says of itself, for messages.
fn shown(text: &str) -> String {
    text.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// PINs that a token refused, hashed with the token they are of.
fn refused_pins() -> std::sync::MutexGuard<'static, Vec<[u8; 32]>> {
    static REFUSED: Mutex<Vec<[u8; 32]>> = Mutex::new(Vec::new());
    REFUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A module, as its thread has it.
struct Module {
    path: PathBuf,
    context: Option<Pkcs11>,
}

impl Module {
    fn context(&mut self) -> Result<&Pkcs11> {
        let path = self.path.display();
        if self.context.is_none() {
            let context = match Pkcs11::new(&self.path) {
                Ok(context) => context,
                Err(_) if !self.path.exists() => {
                    return Err(CryptoError::Token(format!("there is no PKCS#11 module {path}; install the software of the token")));
                }
                Err(e) => return Err(CryptoError::Token(format!("{path} is no PKCS#11 module that can be loaded: {e}"))),
            };
            match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
                Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
                Err(e) => return Err(CryptoError::Token(format!("the PKCS#11 module {path} does not start: {}", explain(&e)))),
            }
            self.context = Some(context);
        }
        self.context.as_ref().ok_or_else(|| CryptoError::Token(format!("the PKCS#11 module {path} is not there")))
    }

    /// Has it look for its tokens anew.
    fn forget(&mut self) {
        if let Some(context) = self.context.take() {
            let _ = context.finalize();
        }
    }
}

type Job = Box<dyn FnOnce(&mut Module) + Send>;

/// The threads of the modules, by their paths.
static THREADS: LazyLock<Mutex<HashMap<PathBuf, Sender<Job>>>> = LazyLock::new(Mutex::default);

fn on_thread_of<T: Send + 'static>(
    path: &Path,
    patience: Duration,
    run: impl FnOnce(&mut Module) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (answer, answered) = mpsc::sync_channel(1);
    let job: Job = Box::new(move |module| {
        // Who asked may have given up.
        let _ = answer.send(run(module));
    });
    let shown = path.display();
    let failed = |text: String| CryptoError::Token(format!("the PKCS#11 module {shown}: {text}"));
    send(path, job).map_err(failed)?;
    match answered.recv_timeout(patience) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            Err(failed(format!("no answer within {} s; is the token asking for something?", patience.as_secs())))
        }
        Err(RecvTimeoutError::Disconnected) => Err(failed("it broke down while it was asked".into())),
    }
}

fn send(path: &Path, job: Job) -> Result<(), String> {
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let job = match threads.get(path) {
        // A thread that is gone gives the job back.
        Some(thread) => match thread.send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(job)) => job,
        },
        None => job,
    };
    let (sender, jobs) = mpsc::channel::<Job>();
    let mut module = Module { path: path.to_owned(), context: None };
    let thread = std::thread::Builder::new().name("token".into()).spawn(move || {
        for job in jobs {
            // Who asked sees that no answer comes; the next one begins anew.
            if std::panic::catch_unwind(AssertUnwindSafe(|| job(&mut module))).is_err() {
                module.forget();
            }
        }
    });
    thread.map_err(|e| format!("cannot start a thread: {e}"))?;
    let _ = sender.send(job);
    threads.insert(path.to_owned(), sender);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_hangs_or_breaks_down_holds_nobody_up() {
        let path = Path::new("/tmp/no-module-at-all.so");
        let (hold, held) = mpsc::channel::<()>();
        let hung = on_thread_of(path, Duration::from_millis(20), move |_| {
            let _ = held.recv();
            Ok(())
        });
        assert!(hung.unwrap_err().to_string().contains("no answer within"));
        let behind = on_thread_of(path, Duration::from_millis(20), |_| Ok(()));
        assert!(behind.is_err(), "what comes after it waits no longer either");
        drop(hold);
        assert_eq!(on_thread_of(path, PATIENCE, |_| Ok(7)), Ok(7), "it goes on when it wakes up");
        let broken = on_thread_of::<()>(path, PATIENCE, |_| panic!("a module's fault"));
        assert!(broken.unwrap_err().to_string().contains("broke down"));
        assert_eq!(on_thread_of(path, PATIENCE, |_| Ok(8)), Ok(8), "it goes on");
    }

    #[test]
    fn what_is_no_module_is_told() {
        let told = |path: &str| TokenKey::new(Path::new(path), "a", "b", None).fingerprint().unwrap_err().to_string();
        assert!(told("/nowhere/module.so").contains("there is no PKCS#11 module /nowhere/module.so"));
        let text = std::env::temp_dir().join(format!("keepd-no-module-{}", std::process::id()));
        std::fs::write(&text, "not a library").unwrap();
        assert!(told(text.to_str().unwrap()).contains("is no PKCS#11 module that can be loaded"));
        std::fs::remove_file(&text).unwrap();
    }
}
