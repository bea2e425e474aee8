//! Interrupts that devices send by message, with and without the help of this process.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::irq::{Message, Messages, Vector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Vm;
use crate::arch::irqchip;

/// The global system interrupts that no pin of an interrupt controller has.
#[expect(clippy::cast_possible_truncation, reason = "KVM has 4096 routes")]
const MESSAGE_GSIS: Range<u32> = irqchip::PINS..KVM_MAX_IRQ_ROUTES as u32;

/// KVM's routes from global system interrupts to where they arrive.
///
/// KVM takes all of them at once: this is the one place that knows them all.
#[derive(Clone)]
pub(crate) struct Routes(Arc<Table>);

struct Table {
    vm: Arc<Vm>,
    /// The message that each interrupt in use becomes; `None` if that is not known yet.
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl Routes {
    /// The routes of `vm`: those of its interrupt controllers, and no message yet.
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self(Arc::new(Table { vm, messages: Mutex::default() }))
    }
}

impl Messages for Routes {
    fn send(&self, message: Message) {
        let Message { address, data } = message;
        let [address_lo, address_hi] = halves(address);
        let msi = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        // A guest may well name a processor that it does not have: that is no error of ours.
        if let Err(error) = self.0.vm.fd().signal_msi(msi) {
            tracing::debug!(?message, %error, "KVM_SIGNAL_MSI");
        }
    }

    fn vector(&self) -> io::Result<Box<dyn Vector>> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        let gsi = self.0.claim()?;
        let table = Arc::clone(&self.0);
        Ok(Box::new(MessageVector { table, gsi, eventfd, attached: Mutex::new(false) }))
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self) -> io::Result<u32> {
        let mut messages = self.lock();
        let free = MESSAGE_GSIS.clone().find(|gsi| !messages.contains_key(gsi));
        // The controllers' own routes count as well.
        let full = messages.len() + irqchip::routes().len() >= KVM_MAX_IRQ_ROUTES;
        let gsi = free.filter(|_| !full).ok_or(io::ErrorKind::QuotaExceeded)?;
        messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives `gsi` another message, in the kernel as here.
    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut messages = self.lock();
        let before = messages.insert(gsi, Some(message));
        if before == Some(Some(message)) {
            return Ok(());
        }
        self.tell(&messages).inspect_err(|_| {
            messages.insert(gsi, before.flatten());
        })
    }

    fn release(&self, gsi: u32) {
        let mut messages = self.lock();
        if messages.remove(&gsi).flatten().is_some()
            && let Err(error) = self.tell(&messages)
        {
            tracing::error!(gsi, %error, "KVM_SET_GSI_ROUTING");
        }
    }

    fn tell(&self, messages: &BTreeMap<u32, Option<Message>>) -> io::Result<()> {
        let known = messages.iter().filter_map(|(gsi, message)| Some((*gsi, (*message)?)));
        let mut entries = irqchip::routes();
        entries.extend(known.map(|(gsi, message)| entry(gsi, message)));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::QuotaExceeded))?;
        self.vm.fd().set_gsi_routing(&table).map_err(into_io)
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [address_lo, address_hi] = halves(message.address);
    let msi =
        kvm_irq_routing_msi { address_lo, address_hi, data: message.data, ..Default::default() };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
fn halves(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

pub(super) fn into_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// An eventfd that KVM makes a message of.
struct MessageVector {
    table: Arc<Table>,
    gsi: u32,
    eventfd: EventFd,
    /// Whether KVM listens to the eventfd. Locked while it is told to, or not to.
    attached: Mutex<bool>,
}

impl MessageVector {
    fn attach(&self, attached: &mut bool) -> io::Result<()> {
        if !*attached {
            self.table.vm.fd().register_irqfd(&self.eventfd, self.gsi).map_err(into_io)?;
            *attached = true;
        }
        Ok(())
    }

    fn detach(&self, attached: &mut bool) -> io::Result<()> {
        if *attached {
            self.table.vm.fd().unregister_irqfd(&self.eventfd, self.gsi).map_err(into_io)?;
            *attached = false;
        }
        Ok(())
    }
}

impl Vector for MessageVector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// What is signalled while it is held back waits in the eventfd, and KVM finds it there.
    fn route(&self, message: Option<Message>) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        match message {
            Some(message) => {
                self.table.route(self.gsi, message)?;
                self.attach(&mut attached)
            }
            None => self.detach(&mut attached),
        }
    }
}

impl Drop for MessageVector {
    fn drop(&mut self) {
        if let Err(error) = self.route(None) {
            tracing::error!(gsi = self.gsi, %error, "KVM_IRQFD");
        }
        self.table.release(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DirtyTracking;
    use crate::memory;

    fn routes() -> Option<Routes> {
        let vm = Vm::new(memory::allocate(64 << 20, None).unwrap(), DirtyTracking::default());
        vm.map_err(|error| eprintln!("skipped: no usable KVM: {error}"))
            .ok()
            .map(|vm| Routes::new(Arc::new(vm)))
    }

    const MESSAGE: Message = Message { address: 0xfee0_0000, data: 0x41 };

    #[test]
    fn vectors_have_interrupts_of_their_own_and_give_them_back() {
        let Some(routes) = routes() else { return };
        let vectors: Vec<_> = (0..3).map(|_| routes.vector().unwrap()).collect();
        for vector in &vectors {
            vector.route(Some(MESSAGE)).unwrap();
            vector.route(Some(Message { data: 0x42, ..MESSAGE })).unwrap();
            vector.eventfd().write(1).unwrap();
        }
        let known = routes.0.lock().keys().copied().collect::<Vec<_>>();
        assert_eq!(known, [24, 25, 26]);
        drop(vectors);
        assert!(routes.0.lock().is_empty());
    }

    #[test]
    fn what_is_signalled_while_held_back_is_not_lost() {
        let Some(routes) = routes() else { return };
        let vector = routes.vector().unwrap();
        vector.route(Some(MESSAGE)).unwrap();
        vector.route(None).unwrap();
        vector.eventfd().write(1).unwrap();
        assert_eq!(vector.eventfd().read().unwrap(), 1, "KVM does not take it");
        vector.eventfd().write(1).unwrap();
        vector.route(Some(MESSAGE)).unwrap();
        let taken = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            vector.eventfd().read().is_err()
        });
        assert!(taken, "KVM takes it");
    }

    #[test]
    fn there_are_no_more_routes_than_kvm_takes() {
        let Some(routes) = routes() else { return };
        let mut vectors = Vec::new();
        while let Ok(gsi) = routes.0.claim() {
            routes.0.lock().insert(gsi, Some(MESSAGE));
            vectors.push(gsi);
        }
        routes.0.tell(&routes.0.lock()).unwrap();
        assert!(vectors.len() > 4000);
    }
}
