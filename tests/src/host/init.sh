#!/bin/busybox sh
# The first program of the lab host. It does all that takes long and depends on nothing of the
# machine that runs the lab; the state after that is kept, and every lab host begins with it.
# Then it enters that machine's root, with a writable layer over it, and starts the agent.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /below /layer /root
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm

fail() { echo "failed: $1" >&3; sleep 60; poweroff -f; }

# Gives VFIO the PCI function $1.
give_to_vfio() {
    echo vfio-pci > "/sys/bus/pci/devices/$1/driver_override"
    echo "$1" > /sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/drivers/vfio-pci/$1" ] || fail "$1 is not VFIO's"
}

while read -r module; do
    # The module of the other vendor's virtualisation finds nothing to do.
    insmod "$module" || echo "lab: $module was not loaded"
done < /modules/order
# The ports of a console appear some time after their driver.
port=
tries=0
until [ -n "$port" ]; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { echo 'lab: there is no port to talk by'; poweroff -f; }
    sleep 0.1
    port=$(grep -ls '^uvmm.lab$' /sys/class/virtio-ports/*/name)
done
port=${port%/name}
exec 3<>"/dev/${port##*/}"
[ -c /dev/kvm ] || fail 'it has no /dev/kvm'
# Guest RAM that is shared memory may have huge pages, as private memory has by default.
echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled

# From here on no driver takes a function unasked: the virtual functions are for VFIO.
echo 0 > /sys/bus/pci/drivers_autoprobe
nics=$(echo /sys/bus/pci/drivers/igb/0000:*)
ip link set lo up
index=0
for nic in $nics; do
    netdev=$(ls "$nic/net")
    echo 2 > "$nic/sriov_numvfs" || fail "$netdev has no virtual functions"
    ip link set "$netdev" up
    export "PF$index=$netdev"
    index=$((index + 1))
done
# Who talks to guests is on the same switch, and on neither of the two hosts: a physical function
# keeps to itself what is for the address of one of its virtual functions, even if that moved.
export PEER_IP=10.7.0.1
peer=$(echo /sys/bus/virtio/drivers/virtio_net/virtio*/net/*)
ip link set "${peer##*/}" up
ip address add $PEER_IP/24 dev "${peer##*/}"
index=0
for nic in $nics; do
    netdev=$(ls "$nic/net")
    # Before there is a link the physical function resets its virtual ones once more.
    tries=0
    until grep -q 1 "/sys/class/net/$netdev/carrier"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "$netdev has no link"
        sleep 0.1
    done
    for number in 0 1; do
        address=52:54:00:07:00:1$((index + 2 * number))
        /full-ip link set "$netdev" vf $number mac $address || fail "$netdev takes no address"
        function=$(readlink "$nic/virtfn$number")
        function=${function##*/}
        give_to_vfio "$function"
        export "VF$((index + 2 * number))=$function"
    done
    index=$((index + 1))
done
# Two more NICs share an IOMMU group. They have no virtual functions, and interrupt by INTx alone.
index=0
for nic in $(grep -l 0x100e /sys/bus/pci/devices/*/device); do
    nic=${nic%/device}
    give_to_vfio "${nic##*/}"
    export "NIC$index=${nic##*/}"
    index=$((index + 1))
done

echo ready >&3
# Here the state is kept; what follows differs from one lab host to the next.
read -r seconds <&3
read -r modules <&3
read -r agent <&3
date -s "@$seconds" > /dev/null
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap,ro root /below ||
    fail 'it cannot see the root of this machine'
mount -t tmpfs -o size=80% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/below,upperdir=/layer/upper,workdir=/layer/work root /root
for dir in proc sys dev; do mount --move /$dir /root/$dir; done
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root/lib/modules
mount --bind "/below/$modules" /root/lib/modules
exec 3>&-
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# The shell stays the first process and collects what is orphaned; without its agent the host ends.
exec /bin/busybox switch_root /root /bin/sh -c \
    '"$0" agent; echo o > /proc/sysrq-trigger; sleep 60' "$agent"
